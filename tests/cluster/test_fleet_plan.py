"""Desired against actual, without Ray and time: scale, replace, make room, remember."""

from __future__ import annotations

import json
from collections.abc import Iterable

from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.cluster.editions import ActorNeeds, Edition
from penstock.cluster.fleet_plan import FleetPlan, Steps
from penstock.cluster.roster import Roster, RosterEntry, WorkerState
from penstock.workers.protocol import Role

OLD = Edition("old", "{}", ActorNeeds(num_cpus=1.0))
NEW = Edition("new", "{}", ActorNeeds(num_cpus=1.0))


def counts(prefill: int = 1, decode: int = 1, mixed: int = 0) -> dict[Role, int]:
    return {Role.PREFILL: prefill, Role.DECODE: decode, Role.MIXED: mixed}


def roster(plan: FleetPlan, not_ready: Iterable[str] = (), stopping: Iterable[tuple[str, Role]] = ()) -> Roster:
    entries = [
        RosterEntry(
            member.worker_id,
            member.role,
            1,
            1,
            WorkerState.STARTING if member.worker_id in set(not_ready) else WorkerState.READY,
            edition=member.edition,
        )
        for member in plan.members.values()
    ]
    entries += [RosterEntry(worker_id, role, 1, 1, WorkerState.STOPPING, edition="old") for worker_id, role in stopping]
    return Roster(1, tuple(entries))


def step(plan: FleetPlan, wanted: Iterable[str] = ("old", "new"), stuck: Iterable[str] = ()) -> Steps:
    return plan.steps(roster(plan), set(wanted), set(stuck))


def ids(members: Iterable[object]) -> list[str]:
    return [member.worker_id for member in members]  # type: ignore[attr-defined]


def test_up_and_down() -> None:
    plan = FleetPlan()
    assert plan.apply(OLD, counts(1, 1))
    assert ids(step(plan).start) == ["prefill-0", "decode-0"]
    assert step(plan) == Steps()
    plan.scale({Role.DECODE: 3})
    assert ids(step(plan).start) == ["decode-1", "decode-2"]
    plan.scale({Role.DECODE: 1})
    assert ids(step(plan).stop) == ["decode-2", "decode-1"]
    plan.scale({Role.DECODE: 2})
    assert ids(step(plan).start) == ["decode-3"], "an id was given out twice"


def test_what_does_not_serve_goes_first() -> None:
    plan = FleetPlan()
    plan.apply(OLD, counts(1, 3))
    step(plan)
    plan.scale({Role.DECODE: 2})
    assert ids(plan.steps(roster(plan, not_ready=["decode-0"]), {"old"}, ()).stop) == ["decode-0"]


def test_the_same_wish_again_does_not_undo_a_scale() -> None:
    plan = FleetPlan()
    plan.apply(OLD, counts(1, 1))
    plan.scale({Role.DECODE: 3})
    assert not plan.apply(OLD, counts(1, 1))
    assert plan.targets["old"].counts[Role.DECODE] == 3
    assert plan.apply(OLD, counts(1, 2))
    assert plan.targets["old"].counts[Role.DECODE] == 2


def test_two_editions_side_by_side_until_the_old_one_is_dropped() -> None:
    plan = FleetPlan()
    plan.apply(OLD, counts(1, 2))
    step(plan)
    plan.apply(NEW, counts(1, 2))
    assert ids(step(plan).start) == ["prefill-1", "decode-2", "decode-3"]
    plan.drop("old")
    assert ids(step(plan).stop) == ["prefill-0", "decode-0", "decode-1"]
    assert set(plan.members) == {"prefill-1", "decode-2", "decode-3"}


def test_an_edition_that_nobody_attends_is_not_added_to() -> None:
    plan = FleetPlan()
    plan.apply(OLD, counts(1, 1))
    assert step(plan, wanted=()) == Steps()
    assert len(step(plan, wanted=("old",)).start) == 2


def test_old_workers_make_room_one_at_a_time_and_never_the_last() -> None:
    plan = FleetPlan()
    plan.apply(OLD, counts(1, 3))
    step(plan)
    plan.apply(NEW, counts(1, 3))
    new = [member.worker_id for member in step(plan).start if member.role is Role.DECODE]
    assert ids(step(plan, stuck=new).stop) == ["decode-2"]
    stopping = [("decode-2", Role.DECODE)]
    assert plan.steps(roster(plan, stopping=stopping), {"old", "new"}, set(new)) == Steps(), "one at a time"
    assert ids(step(plan, stuck=new).stop) == ["decode-1"]
    assert step(plan, stuck=new) == Steps(), "the last one stays"
    assert step(plan, stuck=["decode-0"]) == Steps(), "the new edition never makes room for the old one"


def test_what_was_given_up_comes_back_when_the_new_edition_is_dropped() -> None:
    plan = FleetPlan()
    plan.apply(OLD, counts(1, 2))
    step(plan)
    plan.apply(NEW, counts(1, 2))
    new = [member.worker_id for member in step(plan).start if member.role is Role.DECODE]
    step(plan, stuck=new)
    plan.drop("new")
    steps = step(plan)
    assert ids(steps.start) == ["decode-4"]
    assert len(plan.members) == 3


def test_settled_means_complete_or_as_complete_as_it_gets() -> None:
    plan = FleetPlan()
    plan.apply(OLD, counts(1, 2))
    step(plan)
    assert plan.settled("old", roster(plan), ())
    assert not plan.settled("old", roster(plan, not_ready=["decode-1"]), ())
    assert plan.settled("old", roster(plan, not_ready=["decode-1"]), ["decode-1"])
    everyone = ["decode-0", "decode-1"]
    assert not plan.settled("old", roster(plan, not_ready=everyone), everyone), "nobody decodes"
    assert not plan.settled("new", roster(plan), ())


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["apply-old", "apply-new", "scale", "drop-old", "drop-new"]),
            st.integers(0, 4),
            st.integers(0, 4),
        ),
        max_size=12,
    )
)
def test_any_history_ends_at_its_targets_and_survives_a_restart(history: list[tuple[str, int, int]]) -> None:
    plan = FleetPlan()
    given_out: list[str] = []
    for what, prefill, decode in history:
        if what.startswith("apply"):
            plan.apply(OLD if what.endswith("old") else NEW, counts(prefill, decode))
        elif what == "scale":
            plan.scale({Role.PREFILL: prefill, Role.DECODE: decode})
        else:
            plan.drop(what.removeprefix("drop-"))
        plan = FleetPlan.from_json(json.loads(json.dumps(plan.to_json())))
        given_out += ids(step(plan).start)
    assert step(plan) == Steps()
    assert len(given_out) == len(set(given_out))
    for key, target in plan.targets.items():
        for role in Role:
            members = [m for m in plan.members.values() if m.edition == key and m.role is role]
            assert len(members) == target.counts[role]
    assert {member.edition for member in plan.members.values()} <= set(plan.targets)


def rolled(plan: FleetPlan, room: int | None = None) -> tuple[int, int]:
    """Play a roll to its end; the fewest ready workers and the most workers at any time. `room`: most that fit."""
    ready, stopping = set(plan.members), {}
    fewest, most = len(ready), len(ready)
    for _ in range(200):
        started = set(plan.members) - ready
        fits = started if room is None or len(ready | set(stopping)) < room else set()
        steps = plan.steps(roster(plan, started, stopping.items()), {"old"}, started - fits)
        assert len(steps.start) + len(steps.stop) <= 1, "one by one"
        stopping = {}
        ready |= fits
        ready -= {member.worker_id for member in steps.stop}
        stopping.update({member.worker_id: member.role for member in steps.stop})
        fewest, most = min(fewest, len(ready)), max(most, len(ready) + len(stopping))
        if not plan.rolling and not stopping and ready == set(plan.members):
            return fewest, most
    raise AssertionError("the roll does not end")


def test_a_roll_replaces_everybody_one_by_one_and_starts_the_new_one_first() -> None:
    plan = FleetPlan()
    plan.apply(OLD, counts(2, 3))
    step(plan)
    before = set(plan.members)
    assert plan.roll() == 5
    plan = FleetPlan.from_json(json.loads(json.dumps(plan.to_json())))
    assert rolled(plan) == (5, 6)
    assert not before & set(plan.members)
    assert step(plan) == Steps()


def test_a_roll_without_room_lets_the_old_one_go_first() -> None:
    plan = FleetPlan()
    plan.apply(OLD, counts(1, 2))
    step(plan)
    before = set(plan.members)
    plan.roll()
    assert rolled(plan, room=3) == (2, 3)
    assert not before & set(plan.members)
    assert len(plan.members) == 3
