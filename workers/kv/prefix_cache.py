"""Which blocks of this worker hold the KV of which prefix: a radix tree over chains of SHA-256 digests.

Used by the scheduler (match and hold at admission, publish after a step or a verified transfer, leave at the end) and,
for the chain functions, by the ingress, which computes a prompt's digests once and sends them along. It knows no
sequences. Engine thread only.

Method: RadixAttention (SGLang, NeurIPS 2024), with digests of blocks in place of tokens. A node of the tree is a run of
blocks that so far nobody has parted from, so what is shared is compared, held and left run by run and not block by
block: the cost of a context is that of its branches, whatever its length.

Invariants:
- every cached block is in exactly one run, and a digest names one block for each chain that leads to it;
- a block is published only after its KV is complete, and is evicted only while nobody holds it or one after it;
- a run's holders are the sequences that hold it or a run below it;
- idle runs without children are evicted first, those left first before others, their last blocks first.

The digest of block i is SHA-256(digest of block i-1 || its tokens as int32 little-endian); the chain starts at a root
that stands for all else that shapes KV (tenant salt, model and adapter revision, codec).
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from penstock.workers.errors import IntegrityError
from penstock.workers.kv.block_pool import BlockPool, Blocks
from penstock.workers.kv.cache_changes import CacheChanges, shorten
from penstock.workers.native.digests import chain_of
from penstock.workers.protocol import DIGEST_BYTES

I32 = NDArray[np.int32]
_TOKEN = np.dtype("<i4")
NO_BLOCKS: Blocks = np.zeros(0, np.intp)


def chain(root: bytes, tokens: Sequence[int] | I32, block_size: int) -> list[bytes]:
    """Digests (32 bytes each) of all full blocks of `tokens`, the first one following `root`."""
    raw, width = np.asarray(tokens, _TOKEN).tobytes(), 4 * block_size
    digest, digests = root, []
    for start in range(0, len(raw) // width * width, width):
        digest = sha256(digest + raw[start : start + width]).digest()
        digests.append(digest)
    return digests


def chain_digests(root: bytes, tokens: Sequence[int] | I32, block_size: int) -> bytes:
    """The same as one string, as `GenerateRequest.prefix_digests` carries it."""
    fast = chain_of(root, np.asarray(tokens, _TOKEN).tobytes(), 4 * block_size)
    return b"".join(chain(root, tokens, block_size)) if fast is None else fast


@dataclass(slots=True, eq=False)
class Run:
    """Blocks that follow each other in every chain that has come by; the root of the tree has none."""

    digests: bytes  # 32 each, of `blocks`
    blocks: Blocks
    parent: Run | None
    children: dict[bytes, Run] = field(default_factory=dict)  # by the first digest of each
    holders: int = 0
    left: int = 0  # when it was left last, in order
    queued: bool = False  # it has an entry in the eviction queue, perhaps an outdated one

    @property
    def follows(self) -> Run:
        """The run before this one. Raises IntegrityError for the root, which follows none."""
        if self.parent is None:
            raise IntegrityError("the root of the prefix tree has no blocks")
        return self.parent

    @property
    def path(self) -> Blocks:
        """The blocks of all runs down to this one."""
        return self.blocks if self.parent is None else np.concatenate((self.parent.path, self.blocks))


class Match(NamedTuple):
    """The longest known prefix of a chain: whole runs from the root on, but perhaps only the head of the last one."""

    runs: Sequence[Run]
    num_blocks: int
    num_idle: int  # of these, held by nobody

    @property
    def blocks(self) -> Blocks:
        """[num_blocks], as long as nothing of the match is held."""
        parts = [run.blocks for run in self.runs]
        return (np.concatenate(parts) if len(parts) > 1 else parts[0] if parts else NO_BLOCKS)[: self.num_blocks]


class PrefixCache:
    """The tree over one `BlockPool`. A holder keeps the `Run` it was given last; `root` stands for holding nothing."""

    def __init__(self, pool: BlockPool) -> None:
        self.root = Run(b"", NO_BLOCKS, None)
        self._pool = pool
        self._size = 0
        self._time = 0
        self._queue: list[tuple[int, int, Run]] = []  # heap; every idle run without children has an entry
        self._changes = CacheChanges()
        self._on_idle: Callable[[bytes, Blocks], None] | None = None
        pool.reclaim_by(self._evict)

    def __len__(self) -> int:
        return self._size

    def on_idle(self, tell: Callable[[bytes, Blocks], None]) -> None:
        """Call `tell(digests, blocks)` for blocks that nobody holds any more, those of a prefix first."""
        self._on_idle = tell

    def match(self, digests: bytes) -> Match:
        """The longest known prefix of a chain. Its blocks may be idle until held: hold before allocating."""
        runs: list[Run] = []
        run, at, idle = self.root, 0, 0
        while (child := run.children.get(digests[at : at + DIGEST_BYTES])) is not None:
            run = child
            count = _common_prefix(run.digests, digests, at)
            runs.append(run)
            at += count * DIGEST_BYTES
            idle += count if not run.holders else 0
            if count < len(run.blocks):
                break
        return Match(runs, at // DIGEST_BYTES, idle)

    def hold(self, match: Match, num_blocks: int) -> Run:
        """Hold the first `num_blocks` blocks of a match made just now; the last run of them."""
        held = self.root
        for run in match.runs:
            if not num_blocks:
                break
            held = run if num_blocks >= len(run.blocks) else self._split(run, num_blocks)
            num_blocks -= len(held.blocks)
            self._add_holder(held)
        return held

    def leave(self, run: Run) -> None:
        """The holder of this run, and of all above it, leaves them. Its blocks stay until they are needed."""
        idle: list[Run] = []
        while run.parent is not None:
            run.holders -= 1
            if not run.holders:
                self._time += 1
                run.left = self._time
                self._pool.num_idle += len(run.blocks)
                self._enqueue(run)
                idle.append(run)
            run = run.parent
        if self._on_idle is not None:
            for run in reversed(idle):
                self._on_idle(run.digests, run.blocks)

    def publish(self, run: Run, digests: bytes, blocks: Blocks) -> tuple[Run, Blocks]:
        """The holder of `run` has completed private blocks that follow it. Returns the run it holds from now on, and
        those of the blocks whose content was known already: they stay private, and the first of their kind cached."""
        known = NO_BLOCKS
        while len(blocks):
            child = run.children.get(digests[:DIGEST_BYTES])
            if child is None:
                return self._append(run, digests, blocks), known
            count = _common_prefix(child.digests, digests, 0)
            run = child if count == len(child.blocks) else self._split(child, count)
            self._add_holder(run)
            known = np.concatenate((known, blocks[:count]))
            digests, blocks = digests[count * DIGEST_BYTES :], blocks[count:]
        return run, known

    @property
    def many_events(self) -> bool:
        """So much has changed that the events should be taken soon."""
        return self._changes.many

    def take_events(self) -> tuple[bytes, bytes]:
        """(stored, evicted) since the last call, each the first 8 bytes of every digest. A digest is in one at most."""
        return self._changes.take()

    def snapshot(self) -> bytes:
        """First 8 bytes of every known digest. Take (and send) the events first: the snapshot contains them."""
        return shorten(b"".join(run.digests for run in self.runs()))

    def runs(self) -> Iterator[Run]:
        """All runs, each after the one it follows."""
        found = list(self.root.children.values())
        for run in found:
            yield run
            found.extend(run.children.values())

    def check_integrity(self, held: Mapping[Run, int]) -> None:
        """Raise IntegrityError unless tree, queue and the pool's states agree with who holds which run how often."""
        runs = list(self.runs())
        counts = dict.fromkeys(runs, 0) | dict(held)
        for run in reversed(runs):  # those below come first
            if run.parent is None or run.parent.children.get(run.digests[:DIGEST_BYTES]) is not run:
                raise IntegrityError("a run is not the child of the one it follows")
            if not len(run.blocks) or len(run.digests) != len(run.blocks) * DIGEST_BYTES:
                raise IntegrityError(f"a run of {len(run.blocks)} blocks has {len(run.digests)} bytes of digests")
            if counts[run] != run.holders:
                raise IntegrityError(f"a run has {run.holders} holders, {counts[run]} are known")
            counts[run.parent] = counts.get(run.parent, 0) + counts[run]
            if not run.holders and not run.children and not run.queued:
                raise IntegrityError("an idle run cannot be evicted")
        if len(counts) > len(runs) + 1 or {id(run) for run in runs if run.queued} != {
            id(entry[-1]) for entry in self._queue
        }:
            raise IntegrityError("a run outside the tree is held or queued")
        blocks = np.concatenate((NO_BLOCKS, *(run.blocks for run in runs)))
        if len(blocks) != self._size or not np.array_equal(np.sort(blocks), self._pool.cached_blocks()):
            raise IntegrityError("the pool's cached blocks are not those of the tree")
        if sum(len(run.blocks) for run in runs if not run.holders) != self._pool.num_idle:
            raise IntegrityError("the pool's count of idle blocks is wrong")

    def _append(self, run: Run, digests: bytes, blocks: Blocks) -> Run:
        """New blocks below `run`: a run of their own, unless nobody else could tell it from `run`."""
        self._pool.adopt(blocks)
        self._size += len(blocks)
        self._changes.note(digests, stored=True)
        if run.holders == 1 and not run.children and run.parent is not None:
            run.digests += digests
            run.blocks = np.concatenate((run.blocks, blocks))
            return run
        below = Run(digests, blocks, run, holders=1)
        run.children[digests[:DIGEST_BYTES]] = below
        return below

    def _split(self, run: Run, count: int) -> Run:
        """Part a run after `count` blocks; the new run above it. Whoever held it holds both."""
        at = count * DIGEST_BYTES
        above = Run(run.digests[:at], run.blocks[:count], run.parent, {}, run.holders, run.left)
        run.follows.children[above.digests[:DIGEST_BYTES]] = above
        run.digests, run.blocks, run.parent = run.digests[at:], run.blocks[count:], above
        above.children[run.digests[:DIGEST_BYTES]] = run
        return above

    def _add_holder(self, run: Run) -> None:
        if not run.holders:
            self._pool.num_idle -= len(run.blocks)
        run.holders += 1

    def _enqueue(self, run: Run) -> None:
        if not run.queued and not run.children:
            run.queued = True
            self._time += 1
            heapq.heappush(self._queue, (run.left, self._time, run))

    def _evict(self, count: int) -> Blocks:
        """Take `count` idle blocks, at least one, out of the tree, from the ends of the runs that were left first."""
        parts: list[Blocks] = []
        queue = self._queue
        while count:
            left, _, run = queue[0]
            if run.holders or run.children or left != run.left:  # an outdated entry
                heapq.heappop(queue)
                run.queued = False
                if not run.holders:
                    self._enqueue(run)
                continue
            kept = max(0, len(run.blocks) - count)
            taken, digests = run.blocks[kept:], run.digests[kept * DIGEST_BYTES :]
            self._changes.note(digests, stored=False)
            if not kept:
                heapq.heappop(queue)
                self._remove(run)
            run.blocks, run.digests = run.blocks[:kept], run.digests[: kept * DIGEST_BYTES]
            parts.append(taken[::-1])
            count -= len(taken)
            self._size -= len(taken)
            self._pool.num_idle -= len(taken)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _remove(self, run: Run) -> None:
        parent = run.follows
        del parent.children[run.digests[:DIGEST_BYTES]]
        if parent.parent is not None and not parent.holders:
            self._enqueue(parent)


def _common_prefix(run: bytes, digests: bytes, at: int) -> int:
    """How many leading digests of a run are those of a chain from byte `at` on."""
    if digests.startswith(run, at):
        return len(run) // DIGEST_BYTES
    size = min(len(run), len(digests) - at) // DIGEST_BYTES * DIGEST_BYTES
    ours = np.frombuffer(run, np.uint8, size).reshape(-1, DIGEST_BYTES)
    theirs = np.frombuffer(digests, np.uint8, size, at).reshape(-1, DIGEST_BYTES)
    other = (ours != theirs).any(axis=1)
    return int(other.argmax()) if other.any() else len(other)
