"""Blocks: counts, order of reuse, generations, quarantine, and a stateful test against a plain model."""

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from penstock.workers.errors import IntegrityError
from penstock.workers.kv.block_pool import BlockPool


def ids(*blocks: int) -> np.ndarray:
    return blocks


def test_allocates_distinct_blocks_and_bumps_their_generations():
    generations = np.zeros(4, np.uint64)
    pool = BlockPool(4, generations)
    blocks = pool.allocate(3)
    assert sorted(blocks) == [0, 1, 2]
    assert generations.tolist() == [1, 1, 1, 0]
    assert (pool.num_free, pool.num_owned, pool.num_quarantined) == (1, 3, 0)
    with pytest.raises(IntegrityError, match="1 are free"):
        pool.allocate(2)
    pool.release(blocks)
    pool.check_integrity()
    assert pool.num_free == 4
    assert len(pool.allocate(0)) == 0


def test_cached_blocks_are_evicted_last_in_order_of_release_tail_first():
    pool = BlockPool(6)
    evicted = []
    pool.watch_evictions(evicted.extend)
    first, second = pool.allocate(2), pool.allocate(2)
    for block in first + second:
        pool.mark_cached(block)
    pool.release(second)
    pool.release(first)
    order = [pool.allocate(1)[0] for _ in range(6)]
    assert order[2:] == [second[1], second[0], first[1], first[0]]
    assert evicted == order[2:]


def test_sharing_revives_a_free_cached_block_from_the_middle_of_the_line():
    pool = BlockPool(4)
    blocks = pool.allocate(4)
    for block in blocks:
        pool.mark_cached(block)
    pool.release(blocks)
    assert pool.count_free(blocks) == 4
    pool.share(blocks[1:3])
    assert pool.num_free == 2
    assert pool.num_cached_free == 2
    pool.share(blocks[1:2])
    pool.check_integrity()
    assert set(pool.allocate(2)) == {blocks[0], blocks[3]}
    pool.release(blocks[1:2])
    assert pool.num_free == 0
    pool.release(blocks[1:3])
    assert pool.num_free == 2


def test_quarantined_blocks_are_neither_free_nor_owned():
    pool = BlockPool(4)
    blocks = pool.allocate(3)
    pool.quarantine(blocks[:2])
    assert (pool.num_free, pool.num_owned, pool.num_quarantined) == (1, 1, 2)
    with pytest.raises(IntegrityError):
        pool.release(blocks[:1])
    with pytest.raises(IntegrityError):
        pool.share(blocks[:1])
    pool.check_integrity()
    pool.unquarantine(blocks[:2])
    assert (pool.num_free, pool.num_owned, pool.num_quarantined) == (3, 1, 0)
    with pytest.raises(IntegrityError):
        pool.unquarantine(blocks[:2])


def test_misuse_is_refused():
    pool = BlockPool(4)
    block = pool.allocate(1)
    pool.share(block)
    with pytest.raises(IntegrityError, match="quarantined block"):
        pool.quarantine(block)
    pool.release(block)
    pool.release(block)
    with pytest.raises(IntegrityError, match="nobody holds"):
        pool.release(block)
    with pytest.raises(IntegrityError, match="no cached content"):
        pool.share(block)
    with pytest.raises(IntegrityError, match="generations"):
        BlockPool(4, np.zeros(3, np.uint64))


@pytest.mark.parametrize(
    "corrupt",
    [
        lambda pool: pool._references.__setitem__(0, -1),
        lambda pool: pool._references.__setitem__(3, 1),
        lambda pool: pool._in_quarantine.__setitem__(0, True),
        lambda pool: setattr(pool, "_num_quarantined", 1),
        lambda pool: pool._blank.clear(),
        lambda pool: pool._cached.__setitem__(3, True),
        lambda pool: pool._line.popitem(),
    ],
)
def test_check_integrity_finds_corruption(corrupt):
    pool = BlockPool(4)
    blocks = pool.allocate(2)
    pool.mark_cached(blocks[1])
    pool.release(blocks[1:])
    pool.check_integrity()
    corrupt(pool)
    with pytest.raises(IntegrityError):
        pool.check_integrity()


class PoolMachine(RuleBasedStateMachine):
    """Holders, quarantine and cached marks kept in plain Python beside the pool."""

    @initialize(size=st.integers(1, 24))
    def start(self, size):
        self.pool = BlockPool(size)
        self.size = size
        self.holds: list[list[int]] = []
        self.apart: list[list[int]] = []
        self.cached: set[int] = set()
        self.generation = [0] * size
        self.pool.watch_evictions(self.on_evict)

    def on_evict(self, blocks):
        for block in blocks:
            assert block in self.cached
            self.cached.remove(block)

    def owned(self) -> set[int]:
        return {block for blocks in self.holds for block in blocks}

    def free(self) -> set[int]:
        return set(range(self.size)) - self.owned() - {block for blocks in self.apart for block in blocks}

    @rule(count=st.integers(0, 8))
    def allocate(self, count):
        free = self.free()
        if count > len(free):
            with pytest.raises(IntegrityError):
                self.pool.allocate(count)
            return
        blank = free - self.cached
        blocks = self.pool.allocate(count)
        assert len(set(blocks)) == count
        assert set(blocks) <= free
        assert len(set(blocks) & blank) == min(count, len(blank))
        assert not set(blocks) & self.cached
        for block in blocks:
            self.generation[block] += 1
        self.holds.append(blocks)

    @precondition(lambda self: self.holds)
    @rule(data=st.data())
    def release(self, data):
        blocks = self.holds.pop(data.draw(st.integers(0, len(self.holds) - 1)))
        self.pool.release(blocks)

    @precondition(lambda self: self.holds)
    @rule(data=st.data())
    def cache(self, data):
        blocks = data.draw(st.sampled_from(self.holds))
        self.cached |= set(blocks)
        for block in blocks:
            self.pool.mark_cached(block)

    @rule(data=st.data())
    def share(self, data):
        shareable = sorted(self.owned() | (self.cached & self.free()))
        if shareable:
            blocks = data.draw(st.lists(st.sampled_from(shareable), unique=True, max_size=6))
            assert self.pool.count_free(blocks) == len(set(blocks) & self.free())
            self.pool.share(blocks)
            self.holds.append(blocks)

    @rule(data=st.data())
    def quarantine(self, data):
        held = [block for blocks in self.holds for block in blocks]
        alone = [
            blocks
            for blocks in self.holds
            if all(held.count(block) == 1 and block not in self.cached for block in blocks)
        ]
        if alone:
            blocks = data.draw(st.sampled_from(alone))
            self.holds.remove(blocks)
            self.apart.append(blocks)
            self.pool.quarantine(blocks)

    @precondition(lambda self: self.apart)
    @rule(data=st.data())
    def unquarantine(self, data):
        blocks = self.apart.pop(data.draw(st.integers(0, len(self.apart) - 1)))
        self.pool.unquarantine(blocks)

    @invariant()
    def adds_up(self):
        if not hasattr(self, "pool"):
            return
        self.pool.check_integrity()
        assert self.pool.num_owned == len(self.owned())
        assert self.pool.num_free == len(self.free())
        assert self.pool.num_free + self.pool.num_owned + self.pool.num_quarantined == self.size
        assert set(self.pool.cached_blocks().tolist()) == self.cached
        assert self.pool.generations.tolist() == self.generation


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(deadline=None, max_examples=60, stateful_step_count=40)
