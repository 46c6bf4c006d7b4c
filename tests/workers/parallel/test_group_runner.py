"""Rank 0's runner: the plan goes out first, the time is kept, and a failure ends the group instead of the step."""

from typing import Any, NoReturn

import numpy as np
import pytest
from fakes.random_plans import make_plan

from penstock.workers.errors import BanksLostError, ExpertsGoneError, GroupError
from penstock.workers.kv.layout import KVLayout
from penstock.workers.parallel.group_runner import MOST_RERUNS, GroupRunner
from penstock.workers.parallel.rank_progress import RankProgress
from penstock.workers.parallel.watch import StepPace
from penstock.workers.scheduler.plan import StepPlan, StepResult


class Lost(Exception):  # noqa: N818 - stands in for the end of the process
    pass


class Group:
    """As `RunningGroup`, writing down what happens in order."""

    def __init__(self) -> None:
        self.progress = RankProgress()
        self.pace = StepPace(3.0)
        self.limit_s = 0.0
        self.log: list[Any] = []
        self.sender: Any = self
        self.fails: Exception | None = None

    def send_plan(self, plan: StepPlan) -> int:
        if isinstance(self.fails, GroupError):
            raise self.fails
        self.log.append(("sent", plan.step))
        return 41 + len(self.log)

    def lost(self, error: Exception) -> NoReturn:
        self.log.append(("lost", str(error)))
        raise Lost


class Own:
    layout = KVLayout(1, 1, 1, 16, "int64")
    vocab_size = 7

    def __init__(self, group: Group) -> None:
        self.group = group

    def run(self, plan: StepPlan) -> StepResult:
        self.group.log.append(("ran", plan.step))
        assert self.group.progress.since is not None
        assert self.group.limit_s > 0
        if self.group.fails is not None:
            raise self.group.fails
        return StepResult(np.zeros(len(plan.sample_rows), np.int32))


def test_the_plan_goes_out_before_it_runs() -> None:
    group = Group()
    runner = GroupRunner(Own(group), group)
    plan = make_plan(1, 4)
    assert len(runner.run(plan).token_ids) == len(plan.sample_rows)
    assert group.log == [("sent", plan.step), ("ran", plan.step)]
    assert group.progress.since is None
    assert (group.progress.begun, group.progress.done) == (42, 42)
    assert group.progress.beat().steps == 1
    assert (runner.vocab_size, runner.layout) == (7, Own.layout)


@pytest.mark.parametrize("error", [ValueError("bad step"), GroupError("rank 1 is gone", 1)])
def test_a_failure_ends_the_group(error: Exception) -> None:
    group = Group()
    group.fails = error
    with pytest.raises(Lost):
        GroupRunner(Own(group), group).run(make_plan(1, 4))
    assert group.log[-1] == ("lost", str(error))


class Survival:
    """As `group_runner.Survival`; what happens goes to the group's log."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self.due = False
        self.lost: tuple[int, ...] = ()
        self.hopeless: Exception | None = None
        self.idle: list[Exception | bool] = []

    def go_on(self) -> tuple[int, ...]:
        assert self.group.progress.since is None  # no step is judged meanwhile
        self.group.log.append("met")
        if self.hopeless is not None:
            raise self.hopeless
        self.due = False
        return self.lost

    def refill(self, error: ExpertsGoneError) -> None:
        assert self.group.progress.since is None
        self.group.log.append("refilled")
        if self.hopeless is not None:
            raise self.hopeless

    def use_idle_time(self) -> bool:
        found = self.idle.pop()
        if isinstance(found, Exception):
            raise found
        return found


class FailsAtFirst(Own):
    """Raises these, last first, then runs."""

    def __init__(self, group: Group, *errors: Exception) -> None:
        super().__init__(group)
        self.errors = list(errors)

    def run(self, plan: StepPlan) -> StepResult:
        if self.errors:
            raise self.errors.pop()
        return super().run(plan)


GONE = ExpertsGoneError("experts 4, 5", ((0, 4), (0, 5)))
BROKEN = GroupError("rank 2 has ended", 2)


def surviving(*errors: Exception) -> tuple[Group, Survival, GroupRunner]:
    group = Group()
    survival = Survival(group)
    return group, survival, GroupRunner(FailsAtFirst(group, *errors), group, survival)


def test_banks_that_are_lost_are_the_callers_to_know() -> None:
    group, survival, runner = surviving(BROKEN)
    survival.lost = (2,)
    with pytest.raises(BanksLostError) as caught:
        runner.run(make_plan(1, 4))
    assert caught.value.banks == (2,)
    assert group.log == [("sent", make_plan(1, 4).step), "met"]


def test_a_step_cut_short_without_a_loss_is_run_again() -> None:
    group, _, runner = surviving(BROKEN)
    plan = make_plan(1, 4)
    assert len(runner.run(plan).token_ids) == len(plan.sample_rows)
    assert group.log == [("sent", plan.step), "met", ("sent", plan.step), ("ran", plan.step)]
    assert group.progress.beat().steps == 1


def test_a_step_that_is_always_cut_short_ends_the_group() -> None:
    group, _, runner = surviving(*[BROKEN] * (MOST_RERUNS + 1))
    with pytest.raises(Lost):
        runner.run(make_plan(1, 4))
    assert group.log.count("met") == MOST_RERUNS + 1


def test_a_loss_between_steps_comes_before_the_next() -> None:
    group, survival, runner = surviving()
    survival.due, survival.lost = True, (1,)
    with pytest.raises(BanksLostError):
        runner.run(make_plan(1, 4))
    assert group.log == ["met"]
    survival.due = True
    with pytest.raises(BanksLostError):
        runner.use_idle_time()


def test_a_step_waits_for_experts_that_are_refilled() -> None:
    group, _, runner = surviving(GONE)
    plan = make_plan(1, 4)
    runner.run(plan)
    assert group.log == [("sent", plan.step), "refilled", ("sent", plan.step), ("ran", plan.step)]


def test_experts_that_stay_gone_fail_the_step_and_nothing_else() -> None:
    group, survival, runner = surviving(GONE)
    survival.hopeless = ExpertsGoneError("nobody can refill them", GONE.experts)
    with pytest.raises(ExpertsGoneError, match="nobody can refill"):
        runner.run(make_plan(1, 4))
    survival.hopeless = None
    runner.run(make_plan(2, 4))
    assert not [entry for entry in group.log if entry[0] == "lost"]


def test_a_rank_lost_while_experts_are_refilled() -> None:
    group, survival, runner = surviving(GONE)
    survival.hopeless = BROKEN
    with pytest.raises(Lost):  # nor is there anybody to go on with
        runner.run(make_plan(1, 4))
    assert group.log[-3:] == ["refilled", "met", ("lost", str(BROKEN))]


def test_idle_moments_bring_rounds_on() -> None:
    group, survival, runner = surviving()
    survival.idle = [False, True, BROKEN]
    assert [runner.use_idle_time() for _ in range(3)] == [True, True, False]
    assert group.log == ["met"]
    assert not GroupRunner(Own(group), group).use_idle_time()


def test_a_defect_ends_a_group_that_outlives_ranks_too() -> None:
    _, _, runner = surviving(ValueError("bad step"))
    with pytest.raises(Lost):
        runner.run(make_plan(1, 4))
