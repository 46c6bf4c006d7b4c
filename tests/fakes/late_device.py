"""A device that computes late: a step that was started runs when its result is waited for, or when the test says so.

Around any `run(plan)`. Steps run in their order; a plan that follows an unfinished step gets its tokens, as a GPU does.
What a plan points to is copied at the start, so whatever the caller changes afterwards would be seen by no device.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from penstock.workers.scheduler.plan import StepPlan, StepResult


class LateDevice:
    def __init__(self, run: Callable[[StepPlan], StepResult]) -> None:
        self._run = run
        self._queue: list[StepPlan] = []
        self._results: dict[int, StepResult | Exception] = {}
        self._last: tuple[int, np.ndarray] = (0, np.zeros(0, np.int32))
        self.most_under_way = 0

    @property
    def under_way(self) -> int:
        """Steps that were started and not computed."""
        return len(self._queue)

    def start(self, plan: StepPlan) -> Callable[[], StepResult]:
        """Take the step in; what is returned waits for its result."""
        self._queue.append(replace(plan, block_tables=plan.block_tables.copy(), token_ids=plan.token_ids.copy()))
        self.most_under_way = max(self.most_under_way, len(self._queue))
        return lambda: self._wait(plan.step)

    def work(self, last: int | None = None) -> None:
        """Compute what was started, as far as the step `last`; None: everything."""
        while self._queue and (last is None or self._queue[0].step <= last):
            plan = self._queue.pop(0)
            step, tokens = self._last
            ids = plan.token_ids
            if plan.follows:
                assert step == plan.step - 1
                ids = np.where(ids < 0, np.append(tokens, -1)[np.clip(-1 - ids, 0, len(tokens))], ids)
            assert (ids >= 0).all()
            try:
                result = self._run(replace(plan, token_ids=ids, follows=False))
            except Exception as error:  # noqa: BLE001 - handed to whoever waits
                self._results[plan.step] = error
                self._queue.clear()
                return
            self._last = plan.step, result.token_ids
            self._results[plan.step] = result

    def drop(self, step: int) -> None:
        """It will not be waited for; if it was not computed yet, it never is."""
        self._queue = [plan for plan in self._queue if plan.step != step]
        self._results.pop(step, None)

    def _wait(self, step: int) -> StepResult:
        self.work(step)
        result = self._results.pop(step)
        if isinstance(result, Exception):
            raise result
        return result
