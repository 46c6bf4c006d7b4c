"""Copies blocks of the prefix cache that nobody holds to host memory, and on to the disk, beside the steps.

Part of the tiers (`tiers.py`). Blocks are copied while they are idle, not when they are evicted: eviction never waits.
A block may be given to other content in the middle of its copy; its generation, read before and after, tells, and the
copy is dropped. Every block that reaches host memory is offered to the disk at once: a restart finds what was there.

Invariants: whatever queue is full drops, and counts; `offer` never waits; one thread, `kv-host`, touches host memory.
"""

from __future__ import annotations

import threading
from typing import NamedTuple

import numpy as np

from penstock.workers.kv.block_pool import U64, Blocks
from penstock.workers.kv.disk_tier import DiskTier
from penstock.workers.kv.host_tier import HostTier
from penstock.workers.kv.segment_file import MAX_BLOCKS
from penstock.workers.kv.tier_counts import TierCounts
from penstock.workers.kv.tier_feed import TierChanges
from penstock.workers.kv.work_thread import WorkThread
from penstock.workers.protocol import DIGEST_BYTES
from penstock.workers.transfer.port import BlockMover

MAX_IDLE_BLOCKS = MAX_BLOCKS  # waiting to be copied to host memory; those of one copy make one segment
MAX_WRITE_BYTES = 256 << 20  # waiting for the disk
COPY_BYTES = 8 << 20  # at a time, where the pool does not say: a load waits for no more
_MOST_WRITES = 1 << 16
_LAST_WRITE_S = 2.0


class Idle(NamedTuple):
    """Blocks of one run, idle when offered, with their generations then."""

    digests: bytes
    blocks: Blocks
    generations: U64


class Spill:
    """From one pool to one host tier and perhaps one disk tier."""

    def __init__(
        self,
        pool: BlockMover,
        host: HostTier,
        disk: DiskTier | None,
        copies: WorkThread,
        counts: tuple[TierCounts, TierCounts],
        changes: TierChanges,
    ) -> None:
        """`copies` is the thread that touches host memory; `counts` of host and disk."""
        self._pool = pool
        self._host = host
        self._disk = disk
        self._copies = copies
        self._host_counts, self._disk_counts = counts
        self._changes = changes
        self._writes = WorkThread("kv-write", _MOST_WRITES)
        self._guard = threading.Lock()  # of the next four
        self._idle: list[Idle] = []
        self._idle_blocks = self._write_bytes = 0
        self._copying = False
        if disk is not None:
            self._writes.submit(disk.open)

    def offer(self, digests: bytes, blocks: Blocks) -> None:
        """See `KVTiers.offer`; the engine's thread."""
        held = [digests[at : at + DIGEST_BYTES] in self._host for at in range(0, len(digests), DIGEST_BYTES)]
        if all(held):
            return
        if any(held):
            new = np.flatnonzero(~np.array(held))
            digests = np.frombuffer(digests, np.uint8).reshape(-1, DIGEST_BYTES)[new].tobytes()
            blocks = blocks[new]
        with self._guard:
            if self._idle_blocks + len(blocks) > MAX_IDLE_BLOCKS:
                self._host_counts.dropped += len(blocks)
                return
            self._idle.append(Idle(digests, blocks.copy(), self._pool.generations[blocks].copy()))
            self._idle_blocks += len(blocks)
        self._go_on()

    def stop(self) -> None:
        """Write nothing more; what is not on the disk yet is lost to it."""
        self._writes.stop(_LAST_WRITE_S)

    # --- kv-host --------------------------------------------------------------------------------------------------

    def _go_on(self) -> None:
        """Have `_copy_some` run once more, unless it will anyway."""
        with self._guard:
            if self._idle and not self._copying:
                self._copying = self._copies.submit(self._copy_some) is not None

    def _copy_some(self) -> None:
        """Copy some idle blocks, oldest first; what is left comes after the loads that wait."""
        most = max(1, (self._pool.frame_bytes or COPY_BYTES) // self._pool.block_bytes)
        with self._guard:
            self._copying = False
            digests, blocks, generations = self._idle.pop(0)
            if len(blocks) > most:
                self._idle.insert(0, Idle(digests[most * DIGEST_BYTES :], blocks[most:], generations[most:]))
                digests, blocks, generations = digests[: most * DIGEST_BYTES], blocks[:most], generations[:most]
            self._idle_blocks -= len(blocks)
        try:
            self._copy(Idle(digests, blocks, generations))
        finally:
            self._go_on()

    def _copy(self, idle: Idle) -> None:
        found = self._pool.read(idle.blocks.tolist())
        if found is None:
            self._host_counts.dropped += len(idle.blocks)
            return
        kept: list[tuple[bytes, bytes | memoryview]] = []
        gone: list[bytes] = []
        try:
            for place, view in enumerate(found.blocks):
                digest = idle.digests[place * DIGEST_BYTES : (place + 1) * DIGEST_BYTES]
                data = view if self._disk is None or digest in self._disk else bytes(view)
                gave_way = self._host.store(digest, data)
                if gave_way is not None:
                    gone.append(gave_way)
                # The copy is only then of this digest if nobody was given the block before its end.
                if self._pool.generations[idle.blocks[place]] != idle.generations[place]:
                    self._host.drop(digest)
                    self._host_counts.dropped += 1
                    continue
                kept.append((digest, data))
                self._host_counts.stored += len(view)
        finally:
            found.release()
        self._host_counts.evictions += len(gone)
        self._changes.note(b"".join((*(digest for digest, _ in kept), *gone)))
        copies = [(digest, data) for digest, data in kept if isinstance(data, bytes)]
        if self._disk is not None and copies:
            self._offer_to(self._disk, copies)

    def _offer_to(self, disk: DiskTier, copies: list[tuple[bytes, bytes]]) -> None:
        size = len(copies) * self._pool.block_bytes
        with self._guard:
            full = self._write_bytes + size > MAX_WRITE_BYTES
            self._write_bytes += 0 if full else size
        if full or self._writes.submit(lambda: self._write(disk, copies, size)) is None:
            self._disk_counts.dropped += len(copies)

    # --- kv-write -------------------------------------------------------------------------------------------------

    def _write(self, disk: DiskTier, copies: list[tuple[bytes, bytes]], size: int) -> None:
        try:
            if not disk.write(copies):
                self._disk_counts.dropped += len(copies)
        finally:
            self._written(size)

    def _written(self, size: int) -> None:
        with self._guard:
            self._write_bytes -= size
