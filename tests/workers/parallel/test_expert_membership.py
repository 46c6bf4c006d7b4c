"""Who goes on: everyone that comes, nobody that is dead, and whoever comes too late is left out."""

import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest

from penstock.workers.errors import GroupError
from penstock.workers.parallel.expert_membership import MOST_ATTEMPTS, Membership, survive
from penstock.workers.parallel.process_group import join_store, serve_store


@pytest.fixture
def stores():
    own, address = serve_store("127.0.0.1", 10.0)
    return [own, *(join_store(address, 10.0) for _ in range(3))]


def agree(stores, ranks, epoch, members, *, alive=lambda _: True, grace_s=5.0):
    with ThreadPoolExecutor(4) as threads:
        running = [
            threads.submit(Membership(stores[rank], rank, grace_s, alive).agree, epoch, members) for rank in ranks
        ]
        return [each.result(20) for each in running]


def test_all_that_live_agree_at_once(stores):
    began = time.monotonic()
    assert agree(stores, (0, 1, 3), 1, (0, 1, 2, 3), alive=lambda rank: rank != 2) == [(0, 1, 3)] * 3
    assert agree(stores, (0, 3), 2, (0, 1, 3), alive=lambda rank: rank == 3) == [(0, 3)] * 2
    assert time.monotonic() - began < 4.0


def test_who_comes_too_late_is_left_out(stores):
    assert agree(stores, (0, 1), 1, (0, 1, 2), grace_s=0.2) == [(0, 1)] * 2
    with pytest.raises(GroupError, match="rank 2 is left out of epoch 1"):
        Membership(stores[2], 2, 5.0, lambda _: True).agree(1, (0, 1, 2))


def test_without_rank_0_nobody_goes_on(stores):
    stores[1].set_timeout(timedelta(seconds=0.2))
    with pytest.raises(GroupError, match="rank 0 did not say who goes on as epoch 1"):
        Membership(stores[1], 1, 5.0, lambda _: True).agree(1, (0, 1))


def test_rank_0_calls_before_it_waits(stores):
    """Whoever had ended its part of the step comes by that call only."""
    coming = []

    def call(epoch):
        threads = ThreadPoolExecutor(1)
        coming.append(threads.submit(Membership(stores[1], 1, 5.0, lambda _: True).agree, epoch, (0, 1)))
        threads.shutdown(wait=False)

    assert Membership(stores[0], 0, 5.0, lambda _: True, call).agree(3, (0, 1)) == (0, 1)
    assert [each.result(5) for each in coming] == [(0, 1)]


class Regroups:
    """Fails as often as it is told."""

    def __init__(self, failures):
        self.failures, self.epoch, self.members, self.closed, self.met = failures, 4, (0, 1), 0, []

    def close(self):
        self.closed += 1

    def regroup(self, members, epoch):
        self.met.append((members, epoch))
        if len(self.met) <= self.failures:
            raise GroupError("lost another")


def both(stores, failures):
    ranks = [Regroups(failures), Regroups(failures)]
    made = [Membership(store, rank, 5.0, lambda _: True) for rank, store in enumerate(stores[:2])]
    with ThreadPoolExecutor(2) as threads:
        running = [threads.submit(survive, each, membership) for each, membership in zip(ranks, made, strict=True)]
        return ranks, [each.exception(20) or each.result() for each in running]


def test_surviving_takes_new_epochs_until_a_group_meets(stores):
    ranks, results = both(stores, 2)
    assert results == [(0, 1), (0, 1)]
    assert [epoch for _, epoch in ranks[0].met] == [5, 6, 7]
    assert ranks[0].closed == 3


def test_surviving_is_given_up_when_ranks_are_lost_all_the_time(stores):
    _, results = both(stores, MOST_ATTEMPTS)
    assert all(isinstance(result, GroupError) for result in results)
