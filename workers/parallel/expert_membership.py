"""Who goes on after ranks with experts were lost: agreed on over the group's store, led by rank 0.

Called by `rank_survival.py` when a step raised GroupError. The store is rank 0's: it is the one rank that the
others cannot go on without, since it plans. Knows the store, and of who meets again nothing but the calls of `survive`.

Invariants: an epoch's members are said once; a rank that comes too late, or was believed dead, finds itself left out
and ends (GroupError), so that no two groups of one worker go on.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

from torch._C._distributed_c10d import Store

from penstock.workers.errors import GroupError

LEADER = 0
MOST_ATTEMPTS = 4
_POLL_S = 0.002


class Regrouping(Protocol):
    """What `survive` asks of `rank_survival.SurvivingRank`."""

    members: tuple[int, ...]

    @property
    def epoch(self) -> int:
        """Of the last group met."""
        ...

    def close(self) -> None:
        """Leave the group."""
        ...

    def regroup(self, members: tuple[int, ...], epoch: int) -> None:
        """Meet these."""
        ...


class Membership:
    """One rank's part in the agreement."""

    def __init__(
        self,
        store: Store,
        rank: int,
        grace_s: float,
        alive: Callable[[int], bool],
        call: Callable[[int], object] = lambda _epoch: None,
    ) -> None:
        """`alive` is asked on rank 0 only; it must turn false for a rank that will not come, the sooner the better.

        `grace_s` is how long a rank that lives may take to end its part of the step that failed. `call` is made on
        rank 0 before it waits, with the epoch, for ranks whose part had ended when others were lost.
        """
        self._store, self._rank, self._grace_s, self._alive, self._call = store, rank, grace_s, alive, call

    def agree(self, epoch: int, members: tuple[int, ...]) -> tuple[int, ...]:
        """Those of `members` that go on as `epoch`. Collective over those that live; each asks for an epoch once.

        Raises GroupError on a rank that is left out, or where rank 0 does not answer.
        """
        try:
            return self._lead(epoch, members) if self._rank == LEADER else self._follow(epoch)
        except RuntimeError as error:  # all that the store raises
            reason = str(error).splitlines()[0]
            raise GroupError(f"rank 0 did not say who goes on as epoch {epoch}: {reason}", rank=LEADER) from error

    def _lead(self, epoch: int, members: tuple[int, ...]) -> tuple[int, ...]:
        self._call(epoch)
        missing = {member for member in members if member != LEADER}
        deadline = time.monotonic() + self._grace_s
        while time.monotonic() < deadline:
            missing = {member for member in missing if not self._store.check([_came(epoch, member)])}
            if not any(self._alive(member) for member in sorted(missing)):
                break
            time.sleep(_POLL_S)
        # A rank may have come and died since; the group that meets next will tell.
        chosen = tuple(member for member in members if member not in missing)
        self._store.set(_members(epoch), " ".join(map(str, chosen)))
        return chosen

    def _follow(self, epoch: int) -> tuple[int, ...]:
        # Too late is told apart from not yet: who asks after the answer was given is not in it.
        self._store.set(_came(epoch, self._rank), "1")
        chosen = tuple(int(member) for member in self._store.get(_members(epoch)).split())
        if self._rank not in chosen:
            raise GroupError(f"rank {self._rank} is left out of epoch {epoch}: it came too late", rank=self._rank)
        return chosen


def survive(experts: Regrouping, membership: Membership) -> tuple[int, ...]:
    """After a GroupError: agree on who goes on, and go on; the members. Every surviving rank calls it.

    Raises GroupError where this rank cannot go on: it was left out, rank 0 is gone, or ranks are lost all the time.
    """
    # First, so that ranks still waiting in a collective come too.
    experts.close()
    members, epoch = experts.members, experts.epoch
    for attempt in range(1, MOST_ATTEMPTS + 1):
        members = membership.agree(epoch + attempt, members)
        try:
            experts.regroup(members, epoch + attempt)
        except GroupError:
            if attempt == MOST_ATTEMPTS:
                raise
            experts.close()
        else:
            break
    return members


def _came(epoch: int, rank: int) -> str:
    return f"epoch-{epoch}/came/{rank}"


def _members(epoch: int) -> str:
    return f"epoch-{epoch}/members"
