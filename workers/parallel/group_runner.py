"""The runner of a worker that is a group: every plan goes to the other ranks first, then runs on this one.

The engine has it in place of rank 0's own runner and notices no difference: block ids mean the same on every rank, and
rank 0's result is the group's. It knows neither models nor connections.

A step that fails here may have left the others in the middle of a collective, so there is no going on with the next:
the group ends, the router issues its requests elsewhere, and its host starts it again.
"""

from __future__ import annotations

import time
from typing import NoReturn, Protocol

from penstock.workers.kv.layout import KVLayout
from penstock.workers.parallel.rank_progress import RankProgress
from penstock.workers.parallel.step_channel import StepSender
from penstock.workers.parallel.watch import StepPace
from penstock.workers.scheduler.plan import Runner, StepPlan, StepResult


class RunningGroup(Protocol):
    """What `leader.GroupLeader` offers the engine thread."""

    progress: RankProgress
    pace: StepPace
    limit_s: float
    sender: StepSender

    def lost(self, error: Exception) -> NoReturn:
        """End the group; does not return."""
        ...


class GroupRunner:
    """See `Runner`; `own` is rank 0's shard."""

    def __init__(self, own: Runner, group: RunningGroup) -> None:
        self._own = own
        self._group = group

    @property
    def layout(self) -> KVLayout:
        """What one KV block of rank 0 holds."""
        return self._own.layout

    @property
    def vocab_size(self) -> int:
        """See `Runner.vocab_size`."""
        return self._own.vocab_size

    def run(self, plan: StepPlan) -> StepResult:
        """See `Runner.run`."""
        group = self._group
        try:
            sequence = group.sender.send_plan(plan)
            group.limit_s = group.pace.limit_s(plan.num_tokens)
            group.progress.begin(sequence)
            result = self._own.run(plan)
        except Exception as error:  # noqa: BLE001 - whatever it was, this rank is out of step with the others
            group.lost(error)
        took = group.progress.end(step=True)
        group.pace.observe(plan.num_tokens, took, time.monotonic())
        return result
