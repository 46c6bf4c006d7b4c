"""Blocks: counts, order of reuse, generations, quarantine, and a stateful test against a plain model."""

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from penstock.workers.errors import IntegrityError
from penstock.workers.kv.block_pool import BlockPool


def ids(blocks: list[int]) -> np.ndarray:
    return np.array(blocks, np.int32)


def test_allocates_distinct_blocks_and_bumps_their_generations():
    generations = np.zeros(4, np.uint64)
    pool = BlockPool(4, generations)
    blocks = pool.allocate(3)
    assert sorted(blocks.tolist()) == [0, 1, 2]
    assert generations.tolist() == [1, 1, 1, 0]
    assert sorted(BlockPool(4, generations).allocate(4).tolist()) == [0, 1, 2, 3]
    assert generations.tolist() == [2, 2, 2, 2]
    assert (pool.num_free, pool.num_owned, pool.num_quarantined) == (1, 3, 0)
    with pytest.raises(IntegrityError, match="1 are free"):
        pool.allocate(2)
    pool.free(blocks)
    pool.check_integrity()
    assert pool.num_free == 4
    assert len(pool.allocate(0)) == 0


def test_blank_blocks_go_before_cached_ones_which_are_reclaimed():
    pool = BlockPool(6)
    cached = pool.allocate(4)
    pool.adopt(cached)
    asked = []

    def reclaim(count: int) -> np.ndarray:
        asked.append(count)
        pool.num_idle -= count
        return cached[-count:]

    pool.reclaim_by(reclaim)
    pool.num_idle = 4
    assert pool.num_free == 6
    assert not set(pool.allocate(2).tolist()) & set(cached.tolist())
    assert asked == []
    again = pool.allocate(3)
    assert asked == [3]
    assert again.tolist() == cached[1:].tolist()
    assert pool.generations[cached].tolist() == [1, 3, 3, 3]
    pool.check_integrity()


def test_quarantined_blocks_are_neither_free_nor_owned():
    pool = BlockPool(4)
    blocks = pool.allocate(3)
    pool.quarantine(blocks[:2])
    assert (pool.num_free, pool.num_owned, pool.num_quarantined) == (1, 1, 2)
    with pytest.raises(IntegrityError):
        pool.free(blocks[:1])
    with pytest.raises(IntegrityError):
        pool.adopt(blocks[:1])
    pool.check_integrity()
    pool.unquarantine(blocks[:2])
    assert (pool.num_free, pool.num_owned, pool.num_quarantined) == (3, 1, 0)
    with pytest.raises(IntegrityError):
        pool.unquarantine(blocks[:2])


def test_misuse_is_refused():
    pool = BlockPool(4)
    blocks = pool.allocate(2)
    pool.adopt(blocks[:1])
    for change in (pool.adopt, pool.quarantine, pool.free):
        with pytest.raises(IntegrityError, match="not in state"):
            change(blocks)
    pool.free(blocks[1:])
    with pytest.raises(IntegrityError, match="not in state"):
        pool.free(blocks[1:])
    with pytest.raises(IntegrityError, match="generations"):
        BlockPool(4, np.zeros(3, np.uint64))


@pytest.mark.parametrize(
    "corrupt",
    [
        lambda pool: pool._state.__setitem__(0, 0),
        lambda pool: pool._state.__setitem__(3, 1),
        lambda pool: pool._state.__setitem__(0, 3),
        lambda pool: setattr(pool, "_num_quarantined", 1),
        lambda pool: setattr(pool, "_num_blank", 1),
        lambda pool: pool._blank.__setitem__(0, pool._blank[1]),
        lambda pool: setattr(pool, "num_idle", 2),
        lambda pool: setattr(pool, "num_idle", -1),
    ],
)
def test_check_integrity_finds_corruption(corrupt):
    pool = BlockPool(4)
    blocks = pool.allocate(2)
    pool.adopt(blocks[1:])
    pool.check_integrity()
    corrupt(pool)
    with pytest.raises(IntegrityError):
        pool.check_integrity()


class PoolMachine(RuleBasedStateMachine):
    """What every block is, kept in plain Python beside the pool; the machine plays the prefix cache."""

    @initialize(size=st.integers(1, 24))
    def start(self, size):
        self.pool = BlockPool(size)
        self.size = size
        self.private: list[list[int]] = []
        self.apart: list[list[int]] = []
        self.cached: set[int] = set()
        self.idle: list[int] = []  # of the cached ones, in the order in which they are given back
        self.generation = [0] * size
        self.allocations = 0
        self.pool.reclaim_by(self.reclaim)

    def reclaim(self, count):
        blocks, self.idle = self.idle[:count], self.idle[count:]
        self.cached -= set(blocks)
        self.pool.num_idle -= count
        return ids(blocks)

    def blank(self) -> set[int]:
        taken = {block for blocks in [*self.private, *self.apart] for block in blocks}
        return set(range(self.size)) - taken - self.cached

    @rule(count=st.integers(0, 8))
    def allocate(self, count):
        blank, idle = self.blank(), set(self.idle)
        if count > len(blank | idle):
            with pytest.raises(IntegrityError):
                self.pool.allocate(count)
            return
        blocks = self.pool.allocate(count).tolist()
        assert len(set(blocks)) == count
        assert set(blocks) <= blank | idle
        assert len(set(blocks) & blank) == min(count, len(blank))
        self.allocations += 1
        for block in blocks:
            self.generation[block] = self.allocations
        self.private.append(blocks)

    def draw(self, data, groups):
        return groups.pop(data.draw(st.integers(0, len(groups) - 1)))

    @precondition(lambda self: self.private)
    @rule(data=st.data())
    def free(self, data):
        self.pool.free(ids(self.draw(data, self.private)))

    @precondition(lambda self: self.private)
    @rule(data=st.data())
    def adopt(self, data):
        blocks = self.draw(data, self.private)
        self.pool.adopt(ids(blocks))
        self.cached |= set(blocks)

    @rule(data=st.data())
    def turn_idle(self, data):
        busy = sorted(self.cached - set(self.idle))
        if busy:
            self.idle.append(data.draw(st.sampled_from(busy)))
            self.pool.num_idle += 1

    @precondition(lambda self: self.private)
    @rule(data=st.data())
    def quarantine(self, data):
        self.apart.append(self.draw(data, self.private))
        self.pool.quarantine(ids(self.apart[-1]))

    @precondition(lambda self: self.apart)
    @rule(data=st.data())
    def unquarantine(self, data):
        self.pool.unquarantine(ids(self.draw(data, self.apart)))

    @invariant()
    def adds_up(self):
        if not hasattr(self, "pool"):
            return
        self.pool.check_integrity()
        private = {block for blocks in self.private for block in blocks}
        assert set(self.pool.private_blocks().tolist()) == private
        assert set(self.pool.cached_blocks().tolist()) == self.cached
        assert self.pool.num_owned == len(private) + len(self.cached) - len(self.idle)
        assert self.pool.num_free == len(self.blank()) + len(self.idle)
        assert self.pool.num_free + self.pool.num_owned + self.pool.num_quarantined == self.size
        assert self.pool.generations.tolist() == self.generation


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(deadline=None, max_examples=60, stateful_step_count=40)
