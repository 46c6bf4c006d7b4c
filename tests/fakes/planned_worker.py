"""A worker process that breaks by a plan: `planned_worker.py PLAN_LINE`, otherwise as `penstock.workers.process`."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # as for tests: fakes are importable

from fakes.fault_plan import FaultPlan

from penstock.workers import fault_points
from penstock.workers.process import main

if __name__ == "__main__":
    settings_line = sys.stdin.readline()
    sys.stdin = io.StringIO(settings_line)
    fault_points.plan = FaultPlan.from_line(sys.argv[1], json.loads(settings_line)["worker_id"])
    sys.exit(main())
