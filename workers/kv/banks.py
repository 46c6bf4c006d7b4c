"""The KV blocks of a worker whose ranks have data-parallel attention: a bank for each, side by side.

A sequence lives in one bank, since its attention runs on one rank; the ranks of a tensor-parallel group share one.
Made by the assembly; the scheduler's memory chooses among the banks, and `kv_feed.py` reads what their caches hold
through `BankedCaches`. A worker without expert ranks has one bank. Knows neither sequences nor ranks.

Invariants: the banks are of one size, and their blocks' ids follow each other: block b lies in bank
b // size, at place b % size of that bank's storage.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from penstock.workers.kv.block_pool import U64, BlockPool
from penstock.workers.kv.prefix_cache import PrefixCache


class Bank(NamedTuple):
    """One rank's blocks. `cache` None: nothing is shared."""

    pool: BlockPool
    cache: PrefixCache | None


def make_banks(count: int, num_blocks: int, generations: U64, *, prefix_caching: bool) -> list[Bank]:
    """`count` banks of `num_blocks` each; `generations` uint64 [count * num_blocks], all banks' in order."""
    banks = []
    for number in range(count):
        first = number * num_blocks
        pool = BlockPool(num_blocks, generations[first : first + num_blocks], first)
        banks.append(Bank(pool, PrefixCache(pool) if prefix_caching else None))
    return banks


class BankedCaches:
    """What routers hear of several caches as if they were one.

    What one bank evicts may still be in another: a router's index is a hint, and then gives one too few.
    """

    def __init__(self, caches: Sequence[PrefixCache]) -> None:
        self._caches = tuple(caches)

    @property
    def many_events(self) -> bool:
        """See `PrefixCache.many_events`."""
        return any(cache.many_events for cache in self._caches)

    def take_events(self) -> tuple[bytes, bytes]:
        """See `PrefixCache.take_events`; a digest that one bank stored counts as stored."""
        taken = [cache.take_events() for cache in self._caches]
        stored, evicted = (_distinct(b"".join(part)) for part in zip(*taken, strict=True))
        return stored, _without(evicted, stored)

    def snapshot(self) -> bytes:
        """See `PrefixCache.snapshot`."""
        return _distinct(b"".join(cache.snapshot() for cache in self._caches))


def _distinct(digests: bytes) -> bytes:
    return np.unique(np.frombuffer(digests, np.uint64)).tobytes()


def _without(digests: bytes, others: bytes) -> bytes:
    found = np.frombuffer(digests, np.uint64)
    return found[~np.isin(found, np.frombuffer(others, np.uint64))].tobytes()
