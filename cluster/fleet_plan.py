"""Which workers a cluster should have: editions with their pool sizes, the members that stand for them, and the steps.

The controller keeps one and asks it for the next steps whenever something has changed; it writes the plan to Ray's
key-value store, so that its own restart forgets nothing. Pure: knows neither Ray nor time nor how workers start.

Invariants: a worker id is never given out twice; members of an edition that nobody wants are stopped, never started;
room is made for a new edition only while every role of the old one keeps a worker.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from penstock.cluster.editions import Edition
from penstock.cluster.roster import Roster, RosterEntry, WorkerState
from penstock.workers.protocol import Role

Counts = Mapping[Role, int]


@dataclass(frozen=True, slots=True)
class Member:
    """One worker that belongs to the cluster, running or not."""

    worker_id: str
    role: Role
    edition: str


@dataclass(slots=True)
class Target:
    """One wanted edition. `stated` is what its deployment asked for last, `counts` what holds (`penstock scale`)."""

    edition: Edition
    stated: dict[Role, int]
    counts: dict[Role, int]
    given_up: dict[Role, int] = field(default_factory=dict)  # workers stopped to make room for another edition


@dataclass(frozen=True, slots=True)
class Steps:
    """What to do next; new members are in the plan already, stopped ones have left it."""

    start: tuple[Member, ...] = ()
    stop: tuple[Member, ...] = ()


@dataclass(frozen=True, slots=True)
class Settled:
    """What became of a wish. `established`: the edition has served before, so nobody waited for it to be complete."""

    problem: str = ""  # why it cannot be fulfilled
    established: bool = False


class FleetPlan:
    """See the module's docstring."""

    def __init__(self) -> None:
        self.targets: dict[str, Target] = {}
        self.members: dict[str, Member] = {}
        self.rolling: set[str] = set()  # members that are to be replaced, one after the other; looked up only
        self._next_index = dict.fromkeys(Role, 0)

    def apply(self, edition: Edition, counts: Counts) -> bool:
        """A deployment wants so many workers of an edition; True when that is news.

        The same wish again changes nothing: an ingress that comes back does not undo a `scale`.
        """
        target = self.targets.get(edition.key)
        if target is None:
            self.targets[edition.key] = Target(edition, dict(counts), dict(counts))
            return True
        self.targets[edition.key] = self.targets.pop(edition.key)  # the newest wish stands last
        if target.stated == dict(counts):
            return False
        target.stated, target.counts = dict(counts), dict(counts)
        return True

    def scale(self, changes: Counts) -> None:
        """Other pool sizes, for every edition, until a deployment states others."""
        for target in self.targets.values():
            target.counts.update(changes)

    def roll(self) -> int:
        """Have every member of now replaced by a fresh one, one at a time; how many there are."""
        self.rolling = set(self.members)
        return len(self.rolling)

    def drop(self, edition: str) -> None:
        """Nobody wants the edition any more; what was given up for it comes back."""
        self.targets.pop(edition, None)
        for target in self.targets.values():
            target.given_up.clear()

    def steps(self, roster: Roster, wanted: Collection[str], stuck: Collection[str]) -> Steps:
        """What brings the members to the targets.

        `wanted`: editions that somebody attends at the moment; others are not added to. `stuck`: workers that have
        waited for resources for long.
        """
        entries = {entry.worker_id: entry for entry in roster.entries}
        start: list[Member] = []
        stop = [member for member in self.members.values() if member.edition not in self.targets]
        self._make_room(entries, stuck)
        surge = self._surge(entries, stuck)
        for key, target in self.targets.items():
            for role in Role:
                members = self._members_of(key, role)
                wanted_here = max(0, target.counts.get(role, 0) - target.given_up.get(role, 0))
                surplus = len(members) - wanted_here - ((key, role) == surge)
                if surplus > 0:
                    members.sort(key=lambda member: self._dispensability(member, entries), reverse=True)
                    stop += members[:surplus]
                elif key in wanted:
                    start += [self._add(role, key) for _ in range(-surplus)]
        for member in stop:
            del self.members[member.worker_id]
        return Steps(tuple(start), tuple(stop))

    def settled(self, edition: str, roster: Roster, stuck: Collection[str]) -> bool:
        """True when the edition serves with all it can get: every member is ready, or waits for resources for long."""
        target = self.targets.get(edition)
        if target is None:
            return False
        ready = {entry.worker_id for entry in roster.entries if entry.state is WorkerState.READY}
        members = [member for member in self.members.values() if member.edition == edition]
        if any(member.worker_id not in ready and member.worker_id not in stuck for member in members):
            return False
        wanted = sum(target.counts.values()) - sum(target.given_up.values())
        roles = {member.role for member in members if member.worker_id in ready}
        return len(members) == wanted and (Role.MIXED in roles or roles >= {Role.PREFILL, Role.DECODE})

    def to_json(self) -> dict[str, Any]:
        """Inverse of `from_json`."""
        return {
            "targets": [
                {
                    "edition": target.edition.to_json(),
                    "stated": {role.value: count for role, count in target.stated.items()},
                    "counts": {role.value: count for role, count in target.counts.items()},
                    "given_up": {role.value: count for role, count in target.given_up.items()},
                }
                for target in self.targets.values()
            ],
            "members": [[member.worker_id, member.role.value, member.edition] for member in self.members.values()],
            "next_index": {role.value: index for role, index in self._next_index.items()},
            "rolling": sorted(self.rolling),
        }

    @staticmethod
    def from_json(raw: Mapping[str, Any]) -> FleetPlan:
        """Inverse of `to_json`."""
        plan = FleetPlan()
        for target in raw["targets"]:
            edition = Edition.from_json(target["edition"])
            plan.targets[edition.key] = Target(
                edition, _roles(target["stated"]), _roles(target["counts"]), _roles(target["given_up"])
            )
        plan.members = {worker_id: Member(worker_id, Role(role), key) for worker_id, role, key in raw["members"]}
        plan._next_index = _roles(raw["next_index"])
        plan.rolling = set(raw.get("rolling", ()))
        return plan

    def _members_of(self, edition: str, role: Role) -> list[Member]:
        return [member for member in self.members.values() if member.edition == edition and member.role is role]

    def _add(self, role: Role, edition: str) -> Member:
        index = self._next_index[role]
        self._next_index[role] = index + 1
        member = Member(f"{role.value}-{index}", role, edition)
        self.members[member.worker_id] = member
        return member

    def _surge(self, entries: Mapping[str, RosterEntry], stuck: Collection[str]) -> tuple[str, Role] | None:
        """The pool that has one worker more than it should while one of its members is being replaced.

        The newcomer is awaited first; only where it waits for resources for long does the old one go before it.
        """
        self.rolling &= self.members.keys()
        ready = {worker_id for worker_id, entry in entries.items() if entry.state is WorkerState.READY}
        quiet = all(worker_id in ready for worker_id in self.members) and entries.keys() <= ready
        for key, target in self.targets.items():
            for role in Role:
                members = self._members_of(key, role)
                if not any(member.worker_id in self.rolling for member in members):
                    continue
                count = target.counts.get(role, 0) - target.given_up.get(role, 0)
                fresh = [member.worker_id for member in members if member.worker_id not in self.rolling]
                coming = len(members) > count and not all(each in ready or each in stuck for each in fresh)
                if coming or (len(members) == count and quiet):
                    return key, role
                if len(members) != count or not quiet:
                    return None  # an old one goes now, or is going
        return None

    def _dispensability(self, member: Member, entries: Mapping[str, RosterEntry]) -> tuple[bool, bool, int]:
        """Those to be replaced go first, then those that do not serve, then the youngest."""
        entry = entries.get(member.worker_id)
        serves = entry is not None and entry.state is WorkerState.READY
        return (member.worker_id in self.rolling, not serves, int(member.worker_id.rsplit("-", 1)[-1]))

    def _make_room(self, entries: Mapping[str, RosterEntry], stuck: Collection[str]) -> None:
        """One worker of another edition per role gives way to one that waits for resources, if it is not the last."""
        stopping = {entry.role for entry in entries.values() if entry.state is WorkerState.STOPPING}
        waiting = [self.members[worker_id] for worker_id in stuck if worker_id in self.members]
        for role, members in itertools.groupby(sorted(waiting, key=lambda m: m.role), key=lambda m: m.role):
            newest = {member.edition for member in members}
            for key, target in self.targets.items():
                if key in newest or role in stopping:
                    continue
                kept = target.counts.get(role, 0) - target.given_up.get(role, 0)
                if kept > 1 and key != list(self.targets)[-1]:
                    target.given_up[role] = target.given_up.get(role, 0) + 1
                    break


def _roles(raw: Mapping[str, int]) -> dict[Role, int]:
    return {Role(role): count for role, count in raw.items()}
