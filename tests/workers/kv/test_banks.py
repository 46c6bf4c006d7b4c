"""Banks share one space of block ids and nothing else; routers hear of them as of one cache."""

from __future__ import annotations

import numpy as np
import pytest

from penstock.workers.errors import IntegrityError
from penstock.workers.kv.banks import BankedCaches, make_banks

SIZE = 6


@pytest.fixture
def banks():
    return make_banks(3, SIZE, np.zeros(3 * SIZE, np.uint64), prefix_caching=True)


def store(bank, *digests: int) -> np.ndarray:
    """Publish one block per digest and let them go."""
    blocks = bank.pool.allocate(len(digests))
    run, _ = bank.cache.publish(bank.cache.root, b"".join(bytes([digest]) * 32 for digest in digests), blocks)
    bank.cache.leave(run)
    return blocks


def test_ids_follow_each_other_and_generations_are_everybodys():
    generations = np.zeros(3 * SIZE, np.uint64)
    banks = make_banks(3, SIZE, generations, prefix_caching=False)
    for number, (pool, cache) in enumerate(banks):
        blocks = pool.allocate(SIZE)
        assert cache is None
        assert sorted(blocks.tolist()) == list(range(number * SIZE, (number + 1) * SIZE))
        assert generations[blocks].tolist() == [1] * SIZE == pool.generations_of(blocks).tolist()
        with pytest.raises(IntegrityError):
            pool.allocate(1)
        pool.quarantine(blocks[:2])
        pool.free(blocks[2:])
        pool.check_integrity()
        assert sorted(pool.private_blocks().tolist()) == []
        pool.unquarantine(blocks[:2])
        assert pool.num_free == SIZE


def test_a_bank_evicts_its_own(banks):
    first = store(banks[1], 1, 2, 3)
    assert sorted(banks[1].pool.cached_blocks().tolist()) == sorted(first.tolist())
    again = banks[1].pool.allocate(SIZE)
    assert set(again.tolist()) == set(range(SIZE, 2 * SIZE))
    banks[1].cache.check_integrity({})


def short(*digests: int) -> bytes:
    return b"".join(bytes([digest]) * 8 for digest in digests)


def test_events_of_all_caches_at_once(banks):
    caches = BankedCaches([bank.cache for bank in banks])
    store(banks[0], 1, 2)
    store(banks[2], 1, 4)
    assert caches.take_events() == (short(1, 2, 4), b"")
    assert caches.take_events() == (b"", b"")
    assert caches.snapshot() == short(1, 2, 4)
    banks[2].pool.free(banks[2].pool.allocate(SIZE))
    store(banks[1], 4)
    assert caches.take_events() == (short(4), short(1))  # what moved counts as stored
    assert not caches.many_events
