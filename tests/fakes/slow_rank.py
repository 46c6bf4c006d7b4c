"""A rank whose oracle begins to dawdle: `slow_rank.py STEPS SECONDS`, so long more in every step after so many."""

from __future__ import annotations

import sys
import time

from penstock.workers import computing
from penstock.workers.oracle import OracleRunner
from penstock.workers.process import main
from penstock.workers.scheduler.plan import StepPlan, StepResult

AFTER_STEPS, EXTRA_S = int(sys.argv[1]), float(sys.argv[2])


class SlowOracle(OracleRunner):
    steps = 0

    def run(self, plan: StepPlan) -> StepResult:
        SlowOracle.steps += 1
        if SlowOracle.steps > AFTER_STEPS:
            time.sleep(EXTRA_S)
        return super().run(plan)


if __name__ == "__main__":
    computing.OracleRunner = SlowOracle  # type: ignore[misc]
    sys.exit(main())
