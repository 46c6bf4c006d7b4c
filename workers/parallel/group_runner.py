"""The runner of a worker that is a group: every plan goes to the other ranks first, then runs on this one.

The engine has it in place of rank 0's own runner and notices no difference: block ids mean the same on every rank, and
rank 0's result is the group's. It knows neither models nor connections.

A step that fails here may have left the others in the middle of a collective. Where the group outlives ranks
(`rank_survival.py`) those that are left meet again; the engine hears which banks of KV blocks are gone and plans anew.
Else there is no going on: the group ends, the router issues its requests elsewhere, and its host starts it again.

Invariant: a step that is run again writes to its blocks what it wrote before: KV is a function of the tokens.
"""

from __future__ import annotations

import logging
import time
from typing import NoReturn, Protocol

from penstock.workers.errors import BanksLostError, ExpertsGoneError, GroupError
from penstock.workers.kv.layout import KVLayout
from penstock.workers.parallel.rank_progress import RankProgress
from penstock.workers.parallel.step_channel import StepSender
from penstock.workers.parallel.watch import StepPace
from penstock.workers.scheduler.plan import Runner, StepPlan, StepResult

log = logging.getLogger(__name__)

MOST_RERUNS = 3  # of one step, though no rank was lost


class RunningGroup(Protocol):
    """What `leader.GroupLeader` offers the engine thread."""

    progress: RankProgress
    pace: StepPace
    limit_s: float
    sender: StepSender

    def lost(self, error: Exception) -> NoReturn:
        """End the group; does not return."""
        ...


class Survival(Protocol):
    """How the group goes on without some of its ranks (`rank_survival.LeadingRank`). Each call may raise GroupError."""

    @property
    def due(self) -> bool:
        """A rank has been lost since the others met."""
        ...

    def go_on(self) -> tuple[int, ...]:
        """Meet those that are left; which ranks, and banks, are lost."""
        ...

    def refill(self, error: ExpertsGoneError) -> None:
        """Returns when every expert is held again. Raises `error` where nobody can refill them."""
        ...

    def use_idle_time(self) -> bool:
        """One piece of rebalancing; False where there is none."""
        ...


class GroupRunner:
    """See `Runner`; `own` is rank 0's shard. `survival` None: the group ends when a rank does."""

    def __init__(self, own: Runner, group: RunningGroup, survival: Survival | None = None) -> None:
        self._own = own
        self._group = group
        self._survival = survival

    @property
    def layout(self) -> KVLayout:
        """What one KV block of rank 0 holds."""
        return self._own.layout

    @property
    def vocab_size(self) -> int:
        """See `Runner.vocab_size`."""
        return self._own.vocab_size

    def run(self, plan: StepPlan) -> StepResult:
        """See `Runner.run`. Raises BanksLostError, and ExpertsGoneError for a step that nobody can compute."""
        for _ in range(1 + MOST_RERUNS):
            self._settle()
            try:
                return self._step(plan)
            except ExpertsGoneError as error:
                self._refill(error)
            except GroupError as error:
                self._meet_again(error)
            except Exception as error:  # noqa: BLE001 - whatever it was, this rank is out of step with the others
                self._group.lost(error)
        self._group.lost(GroupError(f"step {plan.step} was cut short {MOST_RERUNS + 1} times"))

    def use_idle_time(self) -> bool:
        """In place of a step: note that ranks are gone, bring rebalancing on. Raises BanksLostError."""
        if self._survival is None:
            return False
        try:
            self._settle()
            return self._survival.use_idle_time()
        except GroupError as error:
            self._meet_again(error)
            return True

    def _step(self, plan: StepPlan) -> StepResult:
        group = self._group
        sequence = group.sender.send_plan(plan)
        group.limit_s = group.pace.limit_s(plan.num_tokens)
        group.progress.begin(sequence)
        result = self._own.run(plan)
        took = group.progress.end(step=True)
        group.pace.observe(plan.num_tokens, took, time.monotonic())
        return result

    def _refill(self, error: ExpertsGoneError) -> None:
        """Let the step wait until no expert is gone. Raises ExpertsGoneError where they stay so, and BanksLostError."""
        self._group.progress.end(step=False)
        if self._survival is None:
            raise error
        log.warning("the step waits until they are refilled: %s", error)
        try:
            self._survival.refill(error)
        except GroupError as lost:
            self._meet_again(lost)

    def _settle(self) -> None:
        """Meet the others if ranks were lost while there was no step. Raises BanksLostError."""
        if self._survival is not None and self._survival.due:
            self._meet_again(GroupError("ranks were lost between steps"))

    def _meet_again(self, error: GroupError) -> None:
        """Go on with who is left, or end the group. Raises BanksLostError where ranks are gone."""
        group, began = self._group, time.monotonic()
        if self._survival is None:
            group.lost(error)
        if group.progress.since is not None:
            group.progress.end(step=False)  # what follows is no part of the step
        log.warning("the ranks meet again: %s", error)
        try:
            lost = self._survival.go_on()
        except GroupError as hopeless:
            group.lost(hopeless)
        log.warning("the ranks have met again after %.3f s", time.monotonic() - began)
        if lost:
            raise BanksLostError(f"{error}; gone: rank {', '.join(map(str, lost))}", lost)
