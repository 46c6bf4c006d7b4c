"""Rank 0's runner: the plan goes out first, the time is kept, and a failure ends the group instead of the step."""

from typing import Any, NoReturn

import numpy as np
import pytest
from fakes.random_plans import make_plan

from penstock.workers.errors import GroupError
from penstock.workers.kv.layout import KVLayout
from penstock.workers.parallel.group_runner import GroupRunner
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
