"""Who holds which KV block: reference counts, the free lists, quarantine and generations.

Used by the scheduler (allocate, share, release) and by the prefix cache (which marks blocks as cached and hears of
evictions). Knows neither tokens, digests nor bytes. Engine thread only. Plain Python lists: a sequence comes and goes
with tens of blocks, for which they cost less than numpy calls.

Invariants, proved by `check_integrity`:
- every block is exactly one of free (no holder), owned (one holder or more), or quarantined: nobody holds it, but a
  transfer may still write it; so free + owned + quarantined = total;
- only a free block is handed out, and its generation grows first, so that a reader of the old content notices;
- blocks without cached content are handed out before cached ones, those in the order of their release, the tail of
  a sequence before its head: prefixes that others may share live longest.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from penstock.workers.errors import IntegrityError

I32 = NDArray[np.int32]
U64 = NDArray[np.uint64]


class BlockPool:
    """`num_blocks` blocks, all free at first. `generations` uint64 [num_blocks] may live in shared memory."""

    def __init__(self, num_blocks: int, generations: U64 | None = None) -> None:
        if generations is not None and len(generations) != num_blocks:
            raise IntegrityError(f"{len(generations)} generations for {num_blocks} blocks")
        self.num_blocks = num_blocks
        self.generations: U64 = np.zeros(num_blocks, np.uint64) if generations is None else generations
        self._generation = self.generations.data  # the same numbers, faster one by one
        self._references = [0] * num_blocks
        self._cached = bytearray(num_blocks)
        self._in_quarantine = bytearray(num_blocks)
        self._num_quarantined = 0
        # Free blocks without cached content: a stack, so that memory still warm is used first.
        self._blank = list(range(num_blocks - 1, -1, -1))
        # Free blocks with cached content, next to be evicted first; linked, so that a hit leaves it from the middle.
        self._line: OrderedDict[int, None] = OrderedDict()
        self._on_evict: Callable[[Sequence[int]], None] | None = None

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` can hand out, cached ones included."""
        return len(self._blank) + len(self._line)

    @property
    def num_owned(self) -> int:
        """Blocks with at least one holder."""
        return self.num_blocks - self.num_free - self._num_quarantined

    @property
    def num_quarantined(self) -> int:
        """Blocks nobody holds but a transfer may still write."""
        return self._num_quarantined

    @property
    def num_cached_free(self) -> int:
        """Free blocks whose content can still be shared."""
        return len(self._line)

    def watch_evictions(self, on_evict: Callable[[Sequence[int]], None]) -> None:
        """Call `on_evict(blocks)` for cached blocks about to be handed out for new content."""
        self._on_evict = on_evict

    def allocate(self, count: int) -> list[int]:
        """`count` distinct blocks for new content, one holder each. Raises IntegrityError if fewer are free."""
        if count > self.num_free:
            raise IntegrityError(f"asked for {count} blocks, {self.num_free} are free")
        split = max(0, len(self._blank) - count)
        blocks = self._blank[split:]
        del self._blank[split:]
        blocks.reverse()
        if len(blocks) < count:
            blocks += self._evict(count - len(blocks))
        references, generation = self._references, self._generation
        for block in blocks:
            references[block] = 1
            generation[block] += 1
        return blocks

    def count_free(self, blocks: Sequence[int]) -> int:
        """How many of these (distinct) blocks nobody holds; sharing them would take that many from `num_free`."""
        references = self._references
        return sum([not references[block] for block in blocks])

    def share(self, blocks: Sequence[int]) -> None:
        """One more holder for each of these distinct blocks, whose content stays. Free ones must be cached."""
        references = self._references
        for block in blocks:
            if not references[block]:
                if not self._cached[block]:
                    raise IntegrityError(f"shared free block {block}, which holds no cached content")
                del self._line[block]
            references[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """One holder less for each of these distinct blocks, given in sequence order; the last is evicted first."""
        references, cached, line, blank = self._references, self._cached, self._line, self._blank
        for block in reversed(blocks):
            left = references[block] - 1
            if left < 0:
                raise IntegrityError(f"released block {block}, which nobody holds")
            references[block] = left
            if left:
                continue
            if cached[block]:
                line[block] = None
            else:
                blank.append(block)

    def quarantine(self, blocks: Sequence[int]) -> None:
        """The one holder of these uncached blocks leaves, but a transfer may still write them: keep them apart."""
        for block in blocks:
            if self._references[block] != 1 or self._cached[block]:
                raise IntegrityError(f"quarantined block {block}, which is shared, cached or free")
            self._references[block] = 0
            self._in_quarantine[block] = 1
            self._num_quarantined += 1

    def unquarantine(self, blocks: Sequence[int]) -> None:
        """The transfer is over: these blocks are free again."""
        for block in blocks:
            if not self._in_quarantine[block]:
                raise IntegrityError(f"lifted the quarantine of block {block}, which is in none")
            self._in_quarantine[block] = 0
            self._num_quarantined -= 1
            self._blank.append(block)

    def mark_cached(self, block: int) -> None:
        """The prefix cache now knows the content of this block, which somebody must hold."""
        self._cached[block] = 1

    def cached_blocks(self) -> I32:
        """Ids of all blocks marked as cached, ascending."""
        return np.flatnonzero(np.frombuffer(self._cached, np.bool_)).astype(np.int32)

    def holders(self) -> I32:
        """Copy of the reference counts, int32 [num_blocks]."""
        return np.array(self._references, np.int32)

    def check_integrity(self) -> None:
        """Raise IntegrityError unless every invariant of the module docstring holds."""
        references = self.holders()
        cached = np.array(self._cached, np.bool_)
        apart = np.array(self._in_quarantine, np.bool_)
        free = (references == 0) & ~apart
        if (references < 0).any():
            raise IntegrityError("a reference count is negative")
        if (apart & ((references > 0) | cached)).any():
            raise IntegrityError("a quarantined block is held or cached")
        if int(np.count_nonzero(apart)) != self._num_quarantined:
            raise IntegrityError("the quarantine count is wrong")
        if sorted(self._blank) != np.flatnonzero(free & ~cached).tolist():
            raise IntegrityError("the blank list is not the set of free uncached blocks")
        if sorted(self._line) != np.flatnonzero(free & cached).tolist():
            raise IntegrityError("the eviction line is not the set of free cached blocks")
        owned = int(np.count_nonzero(references))
        if owned != self.num_owned or self.num_free + owned + self._num_quarantined != self.num_blocks:
            raise IntegrityError("free + owned + quarantined is not the total")

    def _evict(self, count: int) -> list[int]:
        """Take the first `count` blocks out of the line and tell the prefix cache."""
        leave = self._line.popitem
        blocks = [leave(last=False)[0] for _ in range(count)]
        if self._on_evict is not None:
            self._on_evict(blocks)
        for block in blocks:
            self._cached[block] = 0
        return blocks
