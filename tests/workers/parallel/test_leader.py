"""Rank 0 and a follower in one process: complete groups, ranks that do not fit, sessions, and every kind of end."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any, NoReturn

import numpy as np
import pytest
from fakes.random_plans import make_plan

from penstock.workers.errors import ConfigError, ExpertsGoneError, GroupError, IntegrityError, PenstockError
from penstock.workers.parallel import fence
from penstock.workers.parallel.follower import EXIT_FAILED, Follower, FollowerParts
from penstock.workers.parallel.group_messages import (
    ForgetSession,
    GroupMessage,
    Joined,
    MeetAgain,
    PumpExperts,
    SessionOver,
)
from penstock.workers.parallel.leader import GroupLeader
from penstock.workers.scheduler.plan import StepPlan
from penstock.workers.settings import GroupSettings, WorkerSettings
from penstock.workers.transfer.port import IncomingClosed, TransferEvent

KEY = "ab" * 32


class Left(BaseException):
    """Ends the thread in whose place a process would have ended."""


class Transfer:
    """Of a follower: what was asked, and the events it has."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.events: list[TransferEvent] = []

    def forget(self, session_id: bytes) -> None:
        self.asked.append(("forget", session_id))
        self.events.append(IncomingClosed(session_id))

    def poll(self) -> list[TransferEvent]:
        taken, self.events = self.events, []
        return taken


class Runner:
    """As long as it has `error`, or once if that is in `errors`, a step fails by it."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.error: Exception | None = None
        self.errors: list[Exception] = []

    def run(self, plan: StepPlan) -> None:
        if self.errors:
            raise self.errors.pop()
        if self.error is not None:
            raise self.error
        self.steps.append(plan.step)


class Survival:
    """Of a follower: what it was asked."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def go_on(self) -> tuple[int, ...]:
        self.asked.append("go on")
        return (2,)

    def meet_again(self, epoch: int) -> None:
        self.asked.append(epoch)

    def pump(self) -> None:
        self.asked.append("pump")


class Ranks:
    """Rank 0 and one follower, each with an exit that is noted instead of taken."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("kill",):  # all ranks are this very process
            monkeypatch.setattr(fence.RankProcess, name, lambda self: None)
        monkeypatch.setattr(fence.RankProcess, "gone", property(lambda self: True))
        self.codes: dict[str, int] = {}
        group = GroupSettings(tensor_parallel_size=2, start_timeout_s=5.0, heartbeat_s=0.1, silence_s=0.6)
        self.settings = WorkerSettings("w", cluster_key=KEY, group=group)
        self.leader = GroupLeader(self.settings, self._leave("leader"))
        self.follower: Follower
        self.runner, self.transfer = Runner(), Transfer()
        self.survival: Survival | None = None
        self.generations = np.zeros(8, np.uint64)

    def _leave(self, who: str) -> Any:
        def leave(code: int) -> NoReturn:
            self.codes.setdefault(who, code)
            raise Left

        return leave

    def meet(self) -> None:
        group = GroupSettings(
            tensor_parallel_size=2,
            rank=1,
            leader=self.leader.address,
            start_timeout_s=5.0,
            heartbeat_s=0.1,
            silence_s=0.6,
        )

        def come() -> None:
            self.follower = Follower(WorkerSettings("w", cluster_key=KEY, group=group), self._leave("follower"))

        coming = threading.Thread(target=come)
        coming.start()
        self.leader.meet()
        coming.join(5)

    def complete(self, own: str = "same", theirs: str = "same", blocks: tuple[int, int] = (10, 8)) -> tuple[int, int]:
        got: list[int] = []

        def join() -> None:
            try:
                got.append(self.follower.complete(Joined(theirs, blocks[1], "h:1"), self.transfer))  # type: ignore[arg-type]
            except PenstockError:
                got.append(-1)

        joining = threading.Thread(target=join)
        joining.start()
        try:
            number = self.leader.complete(own, blocks[0])
        except PenstockError as error:
            self.leader.abandon_start(error)
            joining.join(5)
            raise
        joining.join(5)
        return number, got[0]

    def serve(self) -> threading.Thread:
        def serve() -> None:
            parts = FollowerParts(self.runner, self.generations, self.transfer, survival=self.survival)  # type: ignore[arg-type]
            self.codes["served"] = self.follower.serve(parts)

        serving = threading.Thread(target=serve, daemon=True)
        serving.start()
        return serving

    def until(self, ready: Any, timeout_s: float = 5.0) -> None:
        give_up = time.monotonic() + timeout_s
        while not ready():
            assert time.monotonic() < give_up, self.codes
            time.sleep(0.01)

    def close(self) -> None:
        self.leader._stopped = True
        if hasattr(self, "follower"):
            self.follower._stopped = True
        for thread in threading.enumerate():
            if thread.name == "group-control":
                thread.join(5)  # while `Left` may still end it
        self.leader._meeting.close()
        self.leader.sender.close()
        for member in self.leader._members.values():
            member.control.close()
        if hasattr(self, "follower"):
            self.follower._control.close()
            self.follower.receiver.close()


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ranks]:
    monkeypatch.setattr(threading, "excepthook", lambda args: None)  # threads end by `Left`
    made = Ranks(monkeypatch)
    yield made
    made.close()


def test_a_group_serves_and_ends_in_order(ranks: Ranks) -> None:
    ranks.meet()
    assert ranks.complete() == (8, 8)
    assert ranks.leader.transfer_addresses == ("h:1",)
    serving = ranks.serve()
    over: list[tuple[int, SessionOver]] = []
    ranks.leader.on_session_over = lambda rank, event: over.append((rank, event))
    generations = np.zeros(8, np.uint64)
    ranks.leader.sender.announce(generations)
    generations[3] = 5
    plan = make_plan(1, 2)
    ranks.leader.sender.send_plan(plan)
    ranks.leader.sender.send(ForgetSession(b"s" * 16))
    ranks.until(lambda: over)
    assert ranks.runner.steps == [plan.step]
    assert ranks.generations.tolist() == generations.tolist()
    assert over == [(1, SessionOver(b"s" * 16, "IncomingClosed", "", ""))]
    time.sleep(1.0)  # longer than silence may last: both say that they live
    assert ranks.codes == {}
    ranks.leader.stop()
    serving.join(5)
    assert ranks.codes == {"served": 0}


def test_ranks_with_other_checkpoints_do_not_start(ranks: Ranks) -> None:
    ranks.meet()
    with pytest.raises(ConfigError, match="rank 1 has loaded revision b, and rank 0 revision a"):
        ranks.complete("revision a", "revision b")


def test_a_follower_that_cannot_load_says_why(ranks: Ranks) -> None:
    ranks.meet()
    ranks.follower.abandon_start(ConfigError("no room for 9 blocks", "kv.num_blocks"))
    with pytest.raises(ConfigError, match="rank 1: no room for 9 blocks") as caught:
        ranks.leader.complete("same", 10)
    assert caught.value.key == "kv.num_blocks"


def test_a_follower_that_fails_ends_the_group(ranks: Ranks) -> None:
    ranks.meet()
    ranks.complete()
    ranks.serve()
    ranks.runner.error = ValueError("no such block")
    ranks.leader.sender.send_plan(make_plan(1, 2))
    ranks.until(lambda: len(ranks.codes) >= 2)
    assert ranks.codes["served"] == EXIT_FAILED
    assert ranks.codes["leader"] == fence.EXIT_GROUP_LOST


def test_a_group_that_can_goes_on_without_a_rank(ranks: Ranks) -> None:
    ranks.meet()
    ranks.complete()
    ranks.serve()
    lost: list[int] = []
    ranks.leader.can_lose_ranks, ranks.leader.on_loss = True, lost.append
    ranks.leader.limit_s = 0.5
    ranks.leader.progress.begin(1)  # a step that waits for the lost rank
    ranks.runner.error = ValueError("no such block")
    ranks.leader.sender.send_plan(make_plan(1, 2))
    ranks.until(lambda: lost)
    assert ranks.leader.lost_ranks == (1,)
    assert not ranks.leader.is_alive(1)
    ranks.leader.let_go(1, "again")
    time.sleep(1.0)  # neither its silence nor the step that it cut short is held against the others
    assert lost == [1]
    assert "leader" not in ranks.codes
    ranks.leader.sender.send_plan(make_plan(2, 2))
    ranks.leader.stop()


def test_rank_0_cannot_be_gone_on_without(ranks: Ranks) -> None:
    ranks.meet()
    ranks.complete()
    ranks.leader.can_lose_ranks = True
    with pytest.raises(Left):
        ranks.leader.lost(GroupError("nobody came"))
    assert ranks.codes["leader"] == fence.EXIT_GROUP_LOST


def test_a_follower_meets_those_that_are_left_and_obeys_on(ranks: Ranks) -> None:
    ranks.survival = Survival()
    ranks.meet()
    ranks.complete()
    ranks.serve()
    send = ranks.leader.sender
    ranks.runner.errors = [ExpertsGoneError("expert 3", ((0, 3),)), GroupError("rank 2 has ended")]
    for step in range(3):
        send.send_plan(make_plan(step, 2))
    send.send(MeetAgain(4))
    send.send(PumpExperts())
    ranks.until(lambda: len(ranks.survival.asked) == 3)
    assert ranks.survival.asked == ["go on", 4, "pump"]
    assert ranks.runner.steps == [make_plan(2, 2).step]
    assert ranks.follower.progress.beat().steps == 1  # steps cut short are none
    assert ranks.codes == {}


def test_a_plan_out_of_order_is_refused_before_it_runs(ranks: Ranks) -> None:
    ranks.meet()
    ranks.complete()
    ranks.serve()
    ranks.leader.sender._links[1]._sent += 1
    ranks.leader.sender.send_plan(make_plan(1, 2))
    ranks.until(lambda: "served" in ranks.codes)
    assert ranks.runner.steps == []
    assert ranks.codes["served"] == EXIT_FAILED


@pytest.mark.parametrize("message", [MeetAgain(1), PumpExperts()])
def test_a_rank_that_cannot_go_on_without_others_is_not_asked_to(message: GroupMessage, ranks: Ranks) -> None:
    ranks.meet()
    ranks.complete()
    ranks.serve()
    ranks.leader.sender.send(message)
    ranks.until(lambda: "served" in ranks.codes)
    assert ranks.codes["served"] == EXIT_FAILED


def test_followers_notice_that_rank_0_is_gone(ranks: Ranks) -> None:
    ranks.meet()
    ranks.complete()
    ranks.serve()
    ranks.leader._stopped = True
    (member,) = ranks.leader._members.values()
    member.control.close()
    ranks.until(lambda: "follower" in ranks.codes)
    assert ranks.codes["follower"] == fence.EXIT_GROUP_LOST


def test_followers_notice_that_rank_0_is_silent(ranks: Ranks) -> None:
    ranks.meet()
    ranks.complete()
    ranks.leader._stopped = True  # its control thread ends, its connections stay
    ranks.until(lambda: "follower" in ranks.codes, 2.0)
    assert ranks.codes["follower"] == fence.EXIT_GROUP_LOST


def test_a_stuck_step_ends_the_group(ranks: Ranks) -> None:
    ranks.meet()
    ranks.complete()
    ranks.leader.limit_s = 0.3
    ranks.leader.progress.begin(1)
    ranks.until(lambda: len(ranks.codes) == 2, 3.0)
    assert ranks.codes["leader"] in (fence.EXIT_GROUP_LOST, fence.EXIT_RANK_STUCK)


def test_a_step_that_failed_on_rank_0_ends_the_group(ranks: Ranks) -> None:
    ranks.meet()
    ranks.complete()
    with pytest.raises(Left):
        ranks.leader.lost(GroupError("all_reduce failed", 1))
    assert ranks.codes["leader"] == fence.EXIT_GROUP_LOST
    ranks.until(lambda: ranks.codes.get("follower") == fence.EXIT_RANK_STUCK)


def test_rank_0_that_is_to_blame_says_so(ranks: Ranks) -> None:
    ranks.meet()
    ranks.complete()
    with pytest.raises(Left):
        ranks.leader.lost(IntegrityError("bad"))
    assert ranks.codes["leader"] == fence.EXIT_RANK_STUCK
