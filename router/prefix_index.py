"""Which worker holds which KV blocks, as far as the router knows: a hint for placement, never a promise.

Links feed it a worker's sequenced events and snapshots (through `router.py`); placement asks `match`. Digests are the
first 8 bytes of the SHA-256 chain over full blocks; the worker's full digest decides. After a gap in a worker's
events the index goes on with what it has, says so (`degraded`), and wants a snapshot.

What the router has just sent somewhere is *assumed* to be cached there for a while (one to two `assume_s`), so that
requests with the same prefix that come before the events do find it. Pure: the caller brings the time.

Invariants: after a snapshot at sequence s and all events after it, the confirmed blocks of a worker are exactly its
cache (short of digests dropped for lack of room, which are counted); events seen twice or too late change nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from penstock.router.digest_table import DigestTable
from penstock.router.settings import IndexSettings
from penstock.workers.protocol import DIGEST_BYTES, KVEvents, KVSnapshot

U64 = NDArray[np.uint64]

_CONFIRMED, _ASSUMED, _ASSUMED_BEFORE = range(3)  # bit columns of a shard's table
_SHARD_WORKERS = 64
_MULTIPLIER = 0x9E3779B97F4A7C15  # 2^64 / golden ratio (Knuth's multiplicative hashing), mixed with the seed


@dataclass(slots=True)
class _Shard:
    table: DigestTable
    holders: list[str | None]  # worker of each bit


@dataclass(slots=True)
class _Tracked:
    shard: _Shard
    bit: int
    sequence: int | None = None  # last event applied; None until the first snapshot
    gaps: int = 0
    degraded: bool = True


def short_digests(digests: bytes) -> U64:
    """First 8 bytes of each 32-byte digest. Shape [N]. A ragged tail is ignored."""
    count = len(digests) // DIGEST_BYTES
    whole = np.frombuffer(digests, "<u8", count * DIGEST_BYTES // 8).reshape(count, DIGEST_BYTES // 8)
    return whole[:, 0].astype(np.uint64)


def _parse(digests8: bytes) -> U64:
    return np.frombuffer(digests8, "<u8", len(digests8) // 8).astype(np.uint64)


class PrefixIndex:
    """The table of one router: every worker's blocks, in shards of 64 workers."""

    def __init__(self, settings: IndexSettings, seed: int = 0) -> None:
        self._settings = settings
        self._multiplier = (_MULTIPLIER ^ (seed << 1)) & (2**64 - 1)
        self._shards: list[_Shard] = []
        self._tracked: dict[str, _Tracked] = {}
        self._turned_at = 0.0

    @property
    def dropped(self) -> int:
        """Digests that found no room in the table."""
        return sum(shard.table.dropped for shard in self._shards)

    @property
    def nbytes(self) -> int:
        """Memory of the tables."""
        return sum(shard.table.nbytes for shard in self._shards)

    def degraded(self) -> list[str]:
        """Workers whose view is known to be incomplete."""
        return [worker_id for worker_id, tracked in self._tracked.items() if tracked.degraded]

    def track(self, worker_id: str) -> None:
        """A worker (re)joined: it holds nothing we know of until its snapshot comes."""
        self.forget(worker_id)
        for shard in self._shards:
            if None in shard.holders:
                break
        else:
            shard = _Shard(DigestTable(3, self._settings.max_entries, self._multiplier), [None] * _SHARD_WORKERS)
            self._shards.append(shard)
        bit = shard.holders.index(None)
        shard.holders[bit] = worker_id
        self._tracked[worker_id] = _Tracked(shard, bit)

    def forget(self, worker_id: str) -> None:
        """The worker is gone and its cache with it."""
        tracked = self._tracked.pop(worker_id, None)
        if tracked is None:
            return
        for column in (_CONFIRMED, _ASSUMED, _ASSUMED_BEFORE):
            tracked.shard.table.clear_bits(column, 1 << tracked.bit)
        tracked.shard.holders[tracked.bit] = None

    def apply_events(self, worker_id: str, events: KVEvents) -> bool:
        """Take in one batch of changes. Returns True, once per gap, when events are missing: ask for a snapshot."""
        tracked = self._tracked.get(worker_id)
        if tracked is None:
            return False
        if tracked.sequence is not None and events.sequence <= tracked.sequence:
            return False
        news = False
        if tracked.sequence is not None and events.sequence == tracked.sequence + 1 and not tracked.degraded:
            tracked.sequence = events.sequence
        elif not tracked.degraded:
            tracked.degraded = news = True
            tracked.gaps += 1
        self._set(tracked, _parse(events.stored))
        self._clear(tracked, _parse(events.evicted))
        return news

    def apply_snapshot(self, worker_id: str, snapshot: KVSnapshot) -> None:
        """Replace everything confirmed about the worker. A snapshot older than what was applied is ignored."""
        tracked = self._tracked.get(worker_id)
        if tracked is None:
            return
        if tracked.sequence is not None and snapshot.sequence < tracked.sequence:
            return
        tracked.shard.table.clear_bits(_CONFIRMED, 1 << tracked.bit)
        self._set(tracked, _parse(snapshot.digests))
        tracked.sequence = snapshot.sequence
        tracked.degraded = False

    def assume(self, worker_id: str, digests: U64, now: float) -> None:
        """The router has sent this prefix there: count it as cached until the worker's events say so themselves."""
        tracked = self._tracked.get(worker_id)
        if tracked is None or not len(digests):
            return
        self._turn(now)
        rows = tracked.shard.table.insert(digests)
        tracked.shard.table.bits[_ASSUMED, rows[rows >= 0]] |= np.uint64(1 << tracked.bit)

    def match(self, digests: U64, now: float) -> dict[str, int]:
        """How many leading blocks of the chain each worker holds; workers that hold none are left out."""
        self._turn(now)
        held: dict[str, int] = {}
        if not len(digests):
            return held
        for shard in self._shards:
            rows = shard.table.find(digests)
            absent = np.flatnonzero(rows < 0)
            length = int(absent[0]) if len(absent) else len(rows)
            if not length:
                continue
            bits = np.bitwise_or.reduce(shard.table.bits[:, rows[:length]], axis=0)
            chain = np.bitwise_and.accumulate(bits)
            for bit, worker_id in enumerate(shard.holders):
                if worker_id is not None and int(chain[0]) >> bit & 1:
                    held[worker_id] = int(np.count_nonzero(chain & np.uint64(1 << bit)))
        return held

    def confirmed(self, worker_id: str) -> set[int]:
        """The blocks a worker is known to hold, for tests and status: a scan of the whole table."""
        tracked = self._tracked[worker_id]
        return tracked.shard.table.holding(_CONFIRMED, 1 << tracked.bit)

    def _set(self, tracked: _Tracked, digests: U64) -> None:
        if len(digests):
            rows = tracked.shard.table.insert(digests)
            tracked.shard.table.bits[_CONFIRMED, rows[rows >= 0]] |= np.uint64(1 << tracked.bit)

    def _clear(self, tracked: _Tracked, digests: U64) -> None:
        """Gone is gone: an assumption about an evicted block is as wrong as its record."""
        if len(digests):
            rows = tracked.shard.table.find(digests)
            tracked.shard.table.bits[:, rows[rows >= 0]] &= ~np.uint64(1 << tracked.bit)

    def _turn(self, now: float) -> None:
        """Age the assumptions: two columns that take turns need no record per block."""
        elapsed = now - self._turned_at
        if elapsed < self._settings.assume_s:
            return
        self._turned_at = now
        for shard in self._shards:
            bits = shard.table.bits
            bits[_ASSUMED_BEFORE] = bits[_ASSUMED] if elapsed < 2 * self._settings.assume_s else 0
            bits[_ASSUMED] = 0
