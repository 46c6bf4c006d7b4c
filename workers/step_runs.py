"""Computes the plans of one engine: each to its end, or the next one started while a step is still under way.

Called by `engine.py` once per turn, on its thread. Where the runner computes beside the host (a GPU), a step is started
before the last one's tokens are known, so the device goes from one to the next without waiting for the host's planning,
committing and reporting. It knows scheduler and runner; nothing of routers, transfers or streams.
Source of the method: the zero-overhead scheduling of SGLang and vLLM's asynchronous scheduling; here a plan names
tokens that are not known yet by the row that samples them.

Invariants: steps land in the order in which they were started; at most two are under way; a runner that raises costs
the sequences of the steps under way, and nothing else; three times in a row is a `DeviceError`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import NamedTuple

from penstock.workers import fault_points
from penstock.workers.errors import BanksLostError, DeviceError, ExpertsGoneError
from penstock.workers.fault_points import Point
from penstock.workers.observation import Observation
from penstock.workers.scheduler.events import SequenceKey, StepOutcome
from penstock.workers.scheduler.open_steps import MOST_STEPS
from penstock.workers.scheduler.plan import Runner, StartStep, StepPlan, StepResult
from penstock.workers.scheduler.scheduler import Scheduler
from penstock.workers.step_time import Progress, StepTimeModel

log = logging.getLogger(__name__)

_MAX_FAILED_STEPS = 3


class Landed(NamedTuple):
    """A step whose result is taken in, or that failed: then `lost` are its sequences."""

    step: int
    outcome: StepOutcome | None
    lost: tuple[SequenceKey, ...] = ()
    reason: str = ""  # why they are


class _Started(NamedTuple):
    plan: StepPlan
    wait: Callable[[], StepResult]
    began: float


class StepRuns:
    """The steps under way of one engine."""

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        start: StartStep | None,
        observation: Observation,
        clock: Callable[[], float],
        step_time: StepTimeModel,
        name: str = "",
    ) -> None:
        """`start` begins a step and returns before it is done; None: the runner computes each to its end.

        `name`: the worker's id.
        """
        self._scheduler = scheduler
        self._runner = runner
        self._start = start
        self._depth = 1 if start is None else MOST_STEPS
        self._observation = observation
        self._clock = clock
        self._step_time = step_time
        self._name = name
        self._under_way: list[_Started] = []
        self._landed_at = 0.0
        self._failed_steps = 0
        self.progress = Progress()  # of the oldest step under way; read by other threads

    def turn(self, plan: StepPlan | None) -> list[Landed]:
        """Start this plan, and wait for what has to land before the next one; without a plan, for all.

        Raises BanksLostError where ranks were lost and nothing of the plan was computed: the caller undoes it.
        """
        landed: list[Landed] = []
        if plan is not None:
            # Such a step brings back more than tokens, and the device is waited for where that is started.
            if self._under_way and plan.brings_more:
                landed.append(self._land())
            failure = self._begin(plan)
            if failure is not None:
                landed.append(failure)
        while self._under_way and (plan is None or len(self._under_way) == self._depth):
            landed.append(self._land())
        return landed

    def _begin(self, plan: StepPlan) -> Landed | None:
        began = self._clock()
        if not self._under_way:
            self._note(plan, began)
        try:
            if fault_points.plan is not None:
                fault_points.plan.reach(Point.STEP_BEGIN, self._name)
            if self._start is None:
                result = self._runner.run(plan)
                self._under_way.append(_Started(plan, lambda: result, began))
            else:
                self._under_way.append(_Started(plan, self._start(plan), began))
        except DeviceError:
            raise
        except BanksLostError:
            self._note_progress(self._clock())
            raise
        except Exception as error:  # the edge around model code: whatever it raises costs this step's sequences only
            log.exception("step %d failed", plan.step)
            return self._failed([plan], error)
        return None

    def _land(self) -> Landed:
        plan, wait, began = self._under_way[0]
        try:
            result = wait()
        except DeviceError:
            raise
        except Exception as error:  # as above; what was started after it was fed by it
            log.exception("step %d failed", plan.step)
            plans = [started.plan for started in self._under_way]
            self._under_way.clear()
            return self._failed(plans, error)
        ended = self._clock()
        began = max(began, self._landed_at)  # until then the device had another one
        self._landed_at = ended
        del self._under_way[0]
        self._failed_steps = 0
        self._step_time.observe(plan.num_tokens, ended - began)
        self._note_progress(ended)
        outcome = self._scheduler.commit(plan, result, ended)
        self._observation.stepped(plan.num_tokens, outcome, began, ended)
        if fault_points.plan is not None:
            fault_points.plan.reach(Point.STEP_END, self._name)
        return Landed(plan.step, outcome)

    def _note_progress(self, now: float) -> None:
        if self._under_way:
            plan = self._under_way[0].plan
            self._note(plan, now)
        else:
            self.progress = Progress(self.progress.step, None, self.progress.predicted_s, *self._step_time.line())

    def _note(self, plan: StepPlan, since: float) -> None:
        predicted_s = self._step_time.predict(plan.num_tokens)
        self.progress = Progress(plan.step, since, predicted_s, *self._step_time.line())

    def _failed(self, plans: list[StepPlan], error: Exception) -> Landed:
        """Undo these, oldest first in the list; their sequences are lost."""
        self._failed_steps += 1
        now = self._clock()
        lost = [key for plan in reversed(plans) for key in self._scheduler.abort_step(plan, now)]
        self._note_progress(now)
        if self._failed_steps >= _MAX_FAILED_STEPS:
            raise DeviceError(f"{self._failed_steps} steps failed in a row") from error
        reason = str(error) if isinstance(error, ExpertsGoneError) else "the step that computed this request failed"
        return Landed(plans[-1].step, None, tuple(lost), reason)
