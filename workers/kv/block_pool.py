"""Which KV blocks are free and which are in use: one state per block, a stack of blank ones, generations.

Used by the scheduler (allocate, free, quarantine) and by the prefix cache, which adopts blocks whose content others may
share and gives idle ones back when blank ones run out. Knows neither tokens, digests nor bytes, nor who shares what.
Engine thread only. Blocks come and go as arrays of distinct ids, so that a long context costs a few numpy calls.

Invariants, proved by `check_integrity` (here for the pool, in the prefix cache for what it adopted):
- every block is exactly one of free, owned, or quarantined: nobody holds it, but a transfer may still write it; so
  free + owned + quarantined = total. A free block is blank, or cached and idle: held by no sequence;
- only a free block is handed out, and its generation grows first, so that a reader of the old content notices: it
  is the number of the allocation, which costs less than counting every block's own;
- blank blocks are handed out before cached ones.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from penstock.workers.errors import IntegrityError
from penstock.workers.kv.block_account import BlockAccount

Blocks = NDArray[np.intp]  # block ids; numpy looks up by native integers several times as fast as by others
U64 = NDArray[np.uint64]

_BLANK, _PRIVATE, _CACHED, _QUARANTINED = range(4)


class BlockPool:
    """`num_blocks` blocks, all blank at first. `generations` uint64 [num_blocks] may live in shared memory.

    Their ids begin at `first`, where one worker has several pools whose blocks must not be taken for each other's.
    """

    def __init__(self, num_blocks: int, generations: U64 | None = None, first: int = 0) -> None:
        if generations is not None and len(generations) != num_blocks:
            raise IntegrityError(f"{len(generations)} generations for {num_blocks} blocks")
        self.num_blocks = num_blocks
        self.first = first
        self.generations: U64 = np.zeros(num_blocks, np.uint64) if generations is None else generations
        self.num_idle = 0  # cached blocks that no sequence holds; counted by the prefix cache
        self._allocations = int(self.generations.max(initial=0))  # the newest generation
        self._state = np.zeros(num_blocks, np.uint8)
        self._num_quarantined = 0
        # A stack: memory still warm goes first.
        self._blank: Blocks = np.arange(first + num_blocks - 1, first - 1, -1, dtype=np.intp)
        self._num_blank = num_blocks
        self._reclaim: Callable[[int], Blocks] | None = None
        self._handed_out = self._freed = self._adopted = self._reclaimed = 0  # blocks, for the ledger

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` can hand out, idle cached ones included."""
        return self._num_blank + self.num_idle

    @property
    def num_owned(self) -> int:
        """Blocks that somebody holds."""
        return self.num_blocks - self.num_free - self._num_quarantined

    @property
    def num_quarantined(self) -> int:
        """Blocks nobody holds but a transfer may still write."""
        return self._num_quarantined

    def reclaim_by(self, reclaim: Callable[[int], Blocks]) -> None:
        """Call `reclaim(count)` for so many idle cached blocks, which are cached no more."""
        self._reclaim = reclaim

    def allocate(self, count: int) -> Blocks:
        """`count` distinct blocks for new content, private to the caller. Raises IntegrityError if fewer are free."""
        if count > self.num_free:
            raise IntegrityError(f"asked for {count} blocks, {self.num_free} are free")
        left = self._num_blank - count
        blocks: Blocks = self._blank[max(left, 0) : self._num_blank].copy()
        self._num_blank = max(left, 0)
        if left < 0 and self._reclaim is not None:
            reclaimed = self._reclaim(-left)
            self._reclaimed += len(reclaimed)
            blocks = np.concatenate((blocks, reclaimed)) if len(blocks) else reclaimed
        self._allocations += 1
        self._handed_out += len(blocks)
        places = blocks - self.first if self.first else blocks
        self._state[places] = _PRIVATE
        self.generations[places] = self._allocations
        return blocks

    def generations_of(self, blocks: Blocks) -> U64:
        """The numbers of these blocks, as they are now."""
        found: U64 = self.generations[blocks - self.first]
        return found

    def free(self, blocks: Blocks) -> None:
        """These private blocks are blank again."""
        self._change(blocks, _PRIVATE, _BLANK)
        self._freed += len(blocks)
        end = self._num_blank + len(blocks)
        self._blank[self._num_blank : end] = blocks
        self._num_blank = end

    def adopt(self, blocks: Blocks) -> None:
        """These private blocks belong to the prefix cache from now on; their holder still holds them."""
        self._change(blocks, _PRIVATE, _CACHED)
        self._adopted += len(blocks)

    def quarantine(self, blocks: Blocks) -> None:
        """The holder of these private blocks leaves, but a transfer may still write them: keep them apart."""
        self._change(blocks, _PRIVATE, _QUARANTINED)
        self._num_quarantined += len(blocks)

    def unquarantine(self, blocks: Blocks) -> None:
        """The transfer is over: these blocks are free again."""
        self._change(blocks, _QUARANTINED, _PRIVATE)
        self._num_quarantined -= len(blocks)
        self.free(blocks)

    def private_blocks(self) -> Blocks:
        """Ids of all blocks with one holder, who shares them with nobody, ascending."""
        return np.flatnonzero(self._state == _PRIVATE) + self.first

    def cached_blocks(self) -> Blocks:
        """Ids of all blocks that belong to the prefix cache, ascending."""
        return np.flatnonzero(self._state == _CACHED) + self.first

    def account(self) -> BlockAccount:
        """What was done with the blocks, and their states counted anew."""
        blank, private, cached, apart = np.bincount(self._state, minlength=4).tolist()
        done = self._handed_out, self._freed, self._adopted, self._reclaimed
        return BlockAccount(self.num_blocks, *done, private, cached, self.num_idle, apart, blank)

    def check_integrity(self) -> None:
        """Raise IntegrityError unless every invariant of the module docstring holds."""
        blank, private, cached, apart = np.bincount(self._state, minlength=4).tolist()
        if not np.array_equal(
            np.sort(self._blank[: self._num_blank]), np.flatnonzero(self._state == _BLANK) + self.first
        ):
            raise IntegrityError("the stack is not the set of blank blocks")
        if apart != self._num_quarantined:
            raise IntegrityError("the quarantine count is wrong")
        if not 0 <= self.num_idle <= cached:
            raise IntegrityError(f"{self.num_idle} of {cached} cached blocks are idle")
        if self.num_owned != private + cached - self.num_idle or blank != self._num_blank:
            raise IntegrityError("free + owned + quarantined is not the total")

    def _change(self, blocks: Blocks, before: int, after: int) -> None:
        places = blocks - self.first if self.first else blocks
        state = self._state
        if state[places].tobytes().count(before) != len(blocks):
            raise IntegrityError(f"some of the blocks {blocks} are not in state {before}")
        state[places] = after
