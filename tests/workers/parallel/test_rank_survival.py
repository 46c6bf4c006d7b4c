"""Ranks on one store meet again without those that are lost; rank 0 sees to it that those have ended."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from fakes.expert_group import TIMEOUT_S, store_meeting

from penstock.workers.errors import ExpertsGoneError, GroupError
from penstock.workers.parallel import rank_survival
from penstock.workers.parallel.expert_membership import Membership
from penstock.workers.parallel.process_group import join_store, serve_store
from penstock.workers.parallel.rank_progress import RankProgress
from penstock.workers.parallel.rank_states import RankStates
from penstock.workers.parallel.rank_survival import LeadingRank, SharedParts, SurvivingRank
from penstock.workers.parallel.shared_prompts import Banks

RANKS = 3


class Experts:
    """As `ExpertParallel`, as far as it is driven beside steps; experts come back after so many pumps."""

    def __init__(self, gone: int = 0) -> None:
        self.asked: list[Any] = []
        self.missing = gone
        self.mending = True

    @property
    def gone(self) -> tuple[tuple[int, int], ...]:
        return tuple((0, expert) for expert in range(self.missing))

    @property
    def wants_pump(self) -> bool:
        return self.missing > 0 and self.mending

    def close(self) -> None:
        self.asked.append("close")

    def regroup(self, members: tuple[int, ...], epoch: int) -> None:
        self.asked.append((members, epoch))

    def pump(self) -> None:
        self.asked.append("pump")
        self.missing -= 1


class Leader:
    def __init__(self) -> None:
        self.lost_ranks: tuple[int, ...] = ()
        self.reasons: list[str] = []

    def is_alive(self, rank: int) -> bool:
        return rank not in self.lost_ranks

    def let_go(self, rank: int, reason: str) -> None:
        self.lost_ranks = tuple(dict.fromkeys((*self.lost_ranks, rank)))
        self.reasons.append(reason)


class Group:
    """Three ranks as threads, each with a store and collectives of its own."""

    def __init__(self, grace_s: float = 5.0) -> None:
        own, address = serve_store("127.0.0.1", TIMEOUT_S)
        self.stores = [own, *(join_store(address, TIMEOUT_S) for _ in range(1, RANKS))]
        self.threads = [ThreadPoolExecutor(1) for _ in range(RANKS)]
        self.leader = Leader()
        self.experts = [Experts() for _ in range(RANKS)]
        self.progress = [RankProgress() for _ in range(RANKS)]
        self.called: list[int] = []
        made = [thread.submit(self._make, rank, grace_s) for rank, thread in enumerate(self.threads)]
        self.ranks = [each.result(TIMEOUT_S) for each in made]

    def _make(self, rank: int, grace_s: float) -> SurvivingRank:
        meet = store_meeting(self.stores[rank], TIMEOUT_S)
        states = RankStates(meet("attention", rank, RANKS, False), Banks(8), 4)
        parts = SharedParts(states, self.experts[rank], meet, self.progress[rank])  # type: ignore[arg-type]
        membership = Membership(self.stores[rank], rank, grace_s, self.leader.is_alive, self.called.append)
        return SurvivingRank(rank, parts, membership)

    def each(self, work: Any, *ranks: int) -> list[Any]:
        running = [self.threads[rank].submit(work, self.ranks[rank]) for rank in ranks]
        return [each.result(TIMEOUT_S) for each in running]

    def leading(self) -> LeadingRank:
        return LeadingRank(self.ranks[0], self.leader, lambda: self.called.append(-1))

    def close(self) -> None:
        for rank, thread in zip(self.ranks, self.threads, strict=True):
            rank.close()
            thread.shutdown()


@pytest.fixture
def group() -> Iterator[Group]:
    made = Group()
    yield made
    made.close()


def summed(rank: SurvivingRank) -> float:
    """Over all ranks that are left."""
    return float(rank._parts.states._group.all_reduce(torch.tensor([float(rank._rank + 1)])))


def test_those_that_are_left_meet_under_a_new_epoch(group: Group) -> None:
    for progress in group.progress:
        with progress.waiting():
            pass
    group.leader.lost_ranks = (1,)
    assert group.each(SurvivingRank.go_on, 0, 2) == [(1,), (1,)]
    assert group.called == [1]
    assert [rank.members for rank in group.ranks] == [(0, 2), (0, 1, 2), (0, 2)]
    assert group.experts[2].asked == ["close", ((0, 2), 1)]
    assert [progress.beat().calls for progress in group.progress] == [0, 1, 0]
    assert group.each(summed, 0, 2) == [4.0, 4.0]


def test_who_has_met_is_not_called_again(group: Group) -> None:
    group.leader.lost_ranks = (1,)
    group.each(SurvivingRank.go_on, 0, 2)
    group.ranks[2].meet_again(1)
    assert group.ranks[2].epoch == 1
    group.leader.lost_ranks = (1, 2)
    assert group.each(SurvivingRank.go_on, 0) == [(2,)]
    assert summed(group.ranks[0]) == 1.0  # alone


def test_a_rank_that_does_not_come_is_left_out_and_ended() -> None:
    group = Group(grace_s=0.3)
    try:
        leading = group.leading()
        assert not leading.due
        running = group.threads[1].submit(group.ranks[1].go_on)
        assert leading.go_on() == (2,)
        assert running.result(TIMEOUT_S) == (2,)
        assert group.leader.reasons == ["rank 2 did not come to the others"]
        assert not leading.due
        with pytest.raises(GroupError, match="left out"):
            group.each(SurvivingRank.go_on, 2)
    finally:
        group.close()


def test_rank_0_knows_when_a_rank_is_to_be_gone_on_without(group: Group) -> None:
    leading = group.leading()
    group.leader.lost_ranks = (2,)
    assert leading.due
    running = group.threads[1].submit(group.ranks[1].meet_again, 1)
    assert leading.go_on() == (2,)
    running.result(TIMEOUT_S)
    assert not leading.due


def test_experts_are_refilled_by_pumping(group: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    leading, experts = group.leading(), group.experts[0]
    assert not leading.use_idle_time()
    experts.missing = 3
    gone = ExpertsGoneError("experts 0, 1, 2", experts.gone)
    leading.refill(gone)
    assert experts.asked == ["pump"] * 3
    assert group.called == [-1] * 3  # the others are told each time
    experts.missing, experts.mending = 1, False
    with pytest.raises(ExpertsGoneError, match="nobody can refill layer 0: expert 0"):
        leading.refill(gone)
    experts.mending = True
    monkeypatch.setattr(rank_survival, "REFILL_WITHIN_S", -1.0)
    with pytest.raises(ExpertsGoneError, match="nobody can refill"):
        leading.refill(gone)
