"""Contexts whose next blocks come back from host memory or disk before they are admitted.

Part of the scheduler: admission asks `begin` for the sequence at the queue's head, which then waits as one does whose
grammar is still being compiled; others pass it. `poll` moves the loads on. What a load brings is published in the
prefix cache and left there, idle, so that admission finds it as if it had never been evicted. Knows no bytes: `Tiers`
moves them.

A sequence waits no longer than computing the same tokens would take. A load that reads the disk holds no blocks of the
pool yet, so a disk that hangs costs nothing else; one that is being written into the pool holds its blocks until that
is done, whatever has become of its sequence.

Invariant: the blocks of every landing are private to it, and it holds the run that they follow.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

from penstock.workers.kv.banks import Bank
from penstock.workers.kv.block_pool import Blocks
from penstock.workers.kv.prefix_cache import NO_BLOCKS, Run
from penstock.workers.kv.tiers import Fetch
from penstock.workers.protocol import DIGEST_BYTES
from penstock.workers.scheduler.sequence import Sequence

_LEAST_WAIT_S = 0.005  # a thread's turn may take as long, however quick computing is


class Tiers(Protocol):
    """What is asked of the tiers; `kv/tiers.py` says what each does. Nothing here waits."""

    def offer(self, digests: bytes, blocks: Blocks) -> None: ...

    def find(self, digests: bytes, first: int) -> int: ...

    def fetch(self, digests: bytes, first: int, count: int) -> Fetch | None: ...

    def give_up(self, fetch: Fetch, *, slow: bool) -> None: ...

    def land(self, fetch: Fetch, skip: int, blocks: Blocks) -> Future[int] | None: ...


@dataclass(slots=True, eq=False)
class Landing:
    """Blocks of the pool that are being written."""

    chain: bytes  # digests of `blocks`
    blocks: Blocks
    run: Run  # that they follow, held
    landed: Future[int]


@dataclass(slots=True, eq=False)
class Load:
    """What one sequence waits for."""

    sequence: Sequence
    first: int  # block of its chain from which on
    deadline: float
    fetch: Fetch
    landing: Landing | None = None


class TierLoads:
    """The loads of one worker, over its one bank."""

    def __init__(self, tiers: Tiers, bank: Bank, predict: Callable[[int], float], block_size: int) -> None:
        """`predict`: seconds of a step of so many tokens. The bank's prefix cache tells the tiers what is idle."""
        self._tiers = tiers
        self._pool = bank.pool
        self._cache = bank.cache
        self._predict = predict
        self._block_size = block_size
        self._loads: list[Load] = []
        if self._cache is not None:
            self._cache.on_idle(tiers.offer)

    def begin(self, sequence: Sequence, spare: int, now: float) -> bool:
        """Load what a sequence without a row lacks, once; True: it waits now. `spare` blocks are to stay free."""
        cache = self._cache
        if cache is None or sequence.looked_below or not sequence.chain or sequence.unscored:
            return False
        first = cache.match(sequence.chain).num_blocks
        if first * DIGEST_BYTES == len(sequence.chain):
            return False
        if len(sequence.chain) // DIGEST_BYTES - first > self._pool.num_free - spare:
            return False  # it cannot be admitted now either
        sequence.looked_below = True
        count = self._tiers.find(sequence.chain, first)
        fetch = self._tiers.fetch(sequence.chain, first, count) if count else None
        if fetch is None:
            return False
        patience_s = max(_LEAST_WAIT_S, self._predict(count * self._block_size))
        load = Load(sequence, first, now + patience_s, fetch)
        sequence.loading = True
        if self._moved_on(load, now):  # at once, where host memory has it all: nobody would wake the engine for it
            return False
        self._loads.append(load)
        return True

    def poll(self, now: float) -> None:
        """Move every load on as far as it goes now. Sequences that need not wait any more do not."""
        self._loads = [load for load in self._loads if not self._moved_on(load, now)]

    @property
    def next_deadline(self) -> float:
        """Poll again by then at the latest; infinity where nothing is due."""
        return min((load.deadline for load in self._loads if load.sequence.loading), default=math.inf)

    @property
    def landings(self) -> list[Landing]:
        """Those whose blocks are being written."""
        return [load.landing for load in self._loads if load.landing is not None]

    def _moved_on(self, load: Load, now: float) -> bool:
        """True where the load is over."""
        if load.landing is not None:
            if not load.landing.landed.done():
                load.sequence.loading &= now < load.deadline
                return False
            self._take_in(load.landing)
        elif not load.sequence.loading:  # it was cancelled, or its time in the queue is over
            self._tiers.give_up(load.fetch, slow=False)
        elif not load.fetch.done:
            if now < load.deadline:
                return False
            self._tiers.give_up(load.fetch, slow=True)
        elif self._land(load):
            return False
        load.sequence.loading = False
        return True

    def _land(self, load: Load) -> bool:
        """Have the fetched blocks written into the pool; False where there is no room, or nothing to do."""
        cache, sequence, pool = self._cache, load.sequence, self._pool
        if cache is None:
            return False
        match = cache.match(sequence.chain)
        skip = match.num_blocks - load.first
        count = len(load.fetch.digests) - skip
        # Blocks that the fetched ones follow may have been evicted meanwhile, or more may be known.
        if skip < 0 or count <= 0 or pool.num_free - match.num_idle < count:
            return False
        run = cache.hold(match, match.num_blocks)
        blocks = pool.allocate(count)
        landed = self._tiers.land(load.fetch, skip, blocks)
        if landed is None:
            pool.free(blocks)
            cache.leave(run)
            return False
        at = match.num_blocks * DIGEST_BYTES
        load.landing = Landing(sequence.chain[at : at + count * DIGEST_BYTES], blocks, run, landed)
        return True

    def _take_in(self, landing: Landing) -> None:
        """What came whole is published and left idle; the rest is blank again."""
        cache, pool = self._cache, self._pool
        came = 0 if landing.landed.exception(0) is not None else landing.landed.result(0)
        if cache is None:
            return
        run, known = landing.run, NO_BLOCKS
        if came:
            run, known = cache.publish(run, landing.chain[: came * DIGEST_BYTES], landing.blocks[:came])
        pool.free(landing.blocks[came:])
        pool.free(known)
        cache.leave(run)
