"""A plan breaks what it says, as often as it says, the same for the same seed; without one a point costs nothing."""

from __future__ import annotations

import errno
import re
import sys
import timeit
from pathlib import Path

import pytest
from fakes.fault_plan import ALWAYS, Action, Fault, FaultPlan, armed, planned_workers
from fakes.worker_process import WorkerProcess, oracle_settings

from penstock.workers import fault_points
from penstock.workers.errors import DeviceError
from penstock.workers.fault_points import Point, Verdict

SEND = Point.TRANSFER_SEND


def verdicts(plan: FaultPlan, count: int, where: str = "w") -> list[Verdict]:
    return [plan.reach(SEND, where, item) for item in range(count)]


def test_a_fault_fires_from_its_visit_on_and_so_often() -> None:
    plan = FaultPlan((Fault(SEND, Action.DROP, after=3, times=2),))
    assert [v is Verdict.DROP for v in verdicts(plan, 6)] == [False, False, True, True, False, False]
    assert plan.fired() == {"transfer.send drop": 2}
    assert not plan.watches("w", SEND)


def test_a_fault_concerns_its_worker_and_its_items_only() -> None:
    plan = FaultPlan((Fault(SEND, Action.DUPLICATE, where="p", items=(1,), times=ALWAYS),))
    assert verdicts(plan, 3, "q") == [Verdict.PASS] * 3
    assert [v is Verdict.DUPLICATE for v in verdicts(plan, 3, "p")] == [False, True, False]
    assert plan.watches("p", SEND)
    assert not plan.watches("q", SEND)
    assert FaultPlan(plan.faults, process="p").reach(SEND, "", 1) is Verdict.DUPLICATE


def test_the_same_seed_is_the_same_schedule_also_as_a_line() -> None:
    plan = FaultPlan((Fault(SEND, Action.DROP, chance=0.3, times=ALWAYS),), seed=5)
    first = verdicts(plan, 200)
    assert verdicts(FaultPlan.from_line(plan.to_line()), 200) == first
    assert verdicts(FaultPlan(plan.faults, seed=6), 200) != first
    assert 30 < first.count(Verdict.DROP) < 90


def test_what_did_not_fire_is_named() -> None:
    plan = FaultPlan((Fault(SEND, Action.DROP), Fault(Point.HEARTBEAT, Action.DELAY)))
    verdicts(plan, 1)
    with pytest.raises(AssertionError, match=r"heartbeat delay$"):
        plan.require_fired()


def test_raising_actions() -> None:
    plan = FaultPlan(
        (
            Fault(Point.STEP_BEGIN, Action.RAISE, error="DeviceError"),
            Fault(Point.DISK_WRITE, Action.DISK_FULL),
        )
    )
    with pytest.raises(DeviceError):
        plan.reach(Point.STEP_BEGIN, "w")
    with pytest.raises(OSError, match="No space") as full:
        plan.reach(Point.DISK_WRITE, "w")
    assert full.value.errno == errno.ENOSPC
    with pytest.raises(ValueError, match="raises one of"):
        Fault(Point.STEP_BEGIN, Action.RAISE, error="SystemExit")


def test_a_clock_jumps_once_from_its_reading_on() -> None:
    plan = FaultPlan((Fault(Point.CLOCK, Action.JUMP, where="w", seconds=100.0, after=3),))
    assert plan.clock("other", lambda: 1.0)() == 1.0
    clock = plan.clock("w", lambda: 1.0)
    assert [clock() for _ in range(4)] == [1.0, 1.0, 101.0, 101.0]
    plan.require_fired()


def test_a_process_that_kills_itself_has_said_so_and_the_next_one_lives(tmp_path: Path) -> None:
    plan = FaultPlan((Fault(Point.WORKER_START, Action.KILL, where="w"),), proof=tmp_path)
    with WorkerProcess(oracle_settings("w"), command=planned_workers(plan)) as first:
        assert first.wait() == -9
    plan.require_fired()
    with WorkerProcess(oracle_settings("w"), command=planned_workers(plan)) as second:
        assert second.facts["worker_id"] == "w"
    assert plan.fired() == {"worker.start kill": 1}


def test_no_setting_arms_a_plan(tmp_path: Path) -> None:
    """Neither the environment nor an argument of the product's own process does."""
    plan = FaultPlan((Fault(Point.WORKER_START, Action.KILL),), proof=tmp_path)
    command = (sys.executable, "-m", "penstock.workers.process", plan.to_line())
    environment = {"PENSTOCK_FAULT_PLAN": plan.to_line()}
    with WorkerProcess(oracle_settings("w"), environment=environment, command=command) as worker:
        assert worker.facts["worker_id"] == "w"
    assert plan.fired() == {}
    product = (Path(fault_points.__file__).parents[1] / room for room in ("kernels", "workers", "router", "cluster"))
    arms = re.compile(r"fault_points\.plan = |fault_points import .*\bplan\b")
    assert [path for room in product for path in room.rglob("*.py") if arms.search(path.read_text())] == []


def test_a_point_without_a_plan_costs_a_look() -> None:
    """Bound: 50 ns on the slowest of machines; here about 20."""
    assert fault_points.plan is None
    look = min(timeit.repeat("fault_points.plan is None", globals={"fault_points": fault_points}, number=100_000)) / 1e5
    call = min(timeit.repeat(lambda: fault_points.times(SEND, "w"), number=100_000)) / 1e5
    print(f"a look {look * 1e9:.0f} ns, times() {call * 1e9:.0f} ns")
    assert look < 200e-9
    assert call < 1e-6


def test_armed_is_over_with_its_block() -> None:
    with armed(FaultPlan((Fault(SEND, Action.DROP),))):
        assert fault_points.times(SEND, "w") == 0
        assert fault_points.times(SEND, "w") == 1
    assert fault_points.plan is None
