"""How ranks that attend for sequences of their own go on after others of their group are lost, and share experts on.

`group_assembly.py` makes a `SurvivingRank` on every rank; a follower calls it from its loop (`follower.py`), rank 0
through `LeadingRank` from its runner (`group_runner.py`). Always on the thread that runs the steps: what a step needs
of other ranks is closed, the ranks that live agree (`expert_membership.py`), and meet again under a new epoch's name.
It does not know plans, sequences or KV blocks.

A group goes on where each copy of the attention is one rank (a rank of a tensor-parallel group takes its whole copy
with it), where all ranks compute on CPUs of one host (so that a lost one can be made sure to have ended, and a peer's
end breaks every wait for it), and as long as rank 0 lives. Any other group ends as a whole (`leader.py`).

Invariant: a rank that is left out of an epoch has ended before the first step of that epoch begins.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from penstock.workers.errors import ExpertsGoneError
from penstock.workers.parallel.expert_losses import named_experts
from penstock.workers.parallel.expert_membership import Membership, survive
from penstock.workers.parallel.expert_parallel import ExpertParallel, Meet
from penstock.workers.parallel.rank_progress import RankProgress
from penstock.workers.parallel.rank_states import RankStates

REFILL_WITHIN_S = 60.0  # experts that no rank holds are back, or steps that need them are refused
_PUMP_EVERY_S = 0.005


@dataclass(frozen=True, slots=True)
class SharedParts:
    """What one rank shares with the others, and how it meets them."""

    states: RankStates
    experts: ExpertParallel | None  # None: each rank has all of them
    meet: Meet
    progress: RankProgress


class SurvivingRank:
    """One rank's connections to the others, closed and met anew; see `expert_membership.Regrouping`."""

    def __init__(self, rank: int, parts: SharedParts, membership: Membership) -> None:
        self._rank = rank
        self._parts = parts
        self._membership = membership
        self.members = parts.states.members
        self.epoch = 0

    @property
    def experts(self) -> ExpertParallel | None:
        """Those shared; None where each rank has all."""
        return self._parts.experts

    def close(self) -> None:
        """See `Regrouping.close`."""
        self._parts.states.close()
        if self._parts.experts is not None:
            self._parts.experts.close()

    def regroup(self, members: tuple[int, ...], epoch: int) -> None:
        """See `Regrouping.regroup`."""
        parts, self.epoch = self._parts, epoch
        attention = parts.meet(f"attention-{epoch}", members.index(self._rank), len(members), False)
        parts.states.regroup(attention, members)
        if parts.experts is not None:
            parts.experts.regroup(members, epoch)
        self.members = members

    def go_on(self) -> tuple[int, ...]:
        """A call to other ranks failed: meet those that are left; which ones are lost since the last time.

        A step that was under way is void. Raises GroupError where this rank cannot go on.
        """
        before = self.members
        survive(self, self._membership)
        self._parts.progress.level()
        return tuple(rank for rank in before if rank not in self.members)

    def meet_again(self, epoch: int) -> None:
        """Rank 0 has lost a rank: as `go_on`, if this one has not noticed by itself."""
        if epoch > self.epoch:
            self.go_on()

    def pump(self) -> None:
        """Let the experts' rebalancing go on without a step; on every rank at the same place. Raises GroupError."""
        if self._parts.experts is not None:
            self._parts.experts.pump()


class LosingLeader(Protocol):
    """What `leader.GroupLeader` knows of lost ranks."""

    @property
    def lost_ranks(self) -> tuple[int, ...]:
        """So far."""
        ...

    def let_go(self, rank: int, reason: str) -> None:
        """See to it that this rank has ended."""
        ...


class LeadingRank:
    """Rank 0's: what `group_runner.py` asks when a step could not be computed, and when there is none."""

    def __init__(self, own: SurvivingRank, leader: LosingLeader, pump: Callable[[], object]) -> None:
        """`pump` tells the other ranks to; this one's own follows."""
        self._own = own
        self._leader = leader
        self._pump = pump

    @property
    def due(self) -> bool:
        """A rank of the group has been lost since it met."""
        return any(rank in self._own.members for rank in self._leader.lost_ranks)

    def go_on(self) -> tuple[int, ...]:
        """See `SurvivingRank.go_on`; whoever is left out has ended when this returns."""
        lost = self._own.go_on()
        for rank in lost:
            self._leader.let_go(rank, f"rank {rank} did not come to the others")
        return lost

    def use_idle_time(self) -> bool:
        """Bring a round of rebalancing on that waits for a step. False: there is none. Raises GroupError."""
        experts = self._own.experts
        if experts is None or not experts.wants_pump:
            return False
        self._pump()
        self._own.pump()
        return True

    def refill(self, error: ExpertsGoneError) -> None:
        """Returns when every expert is held again. Raises `error` where nobody can refill them, and GroupError."""
        experts = self._own.experts
        give_up = time.monotonic() + REFILL_WITHIN_S
        while experts is not None and experts.gone:
            if not experts.mending or time.monotonic() > give_up:
                raise ExpertsGoneError(f"nobody can refill {named_experts(experts.gone)}", experts.gone) from error
            if not self.use_idle_time():
                time.sleep(_PUMP_EVERY_S)
