"""How long a device waits for the host between two steps: each step planned after the last one's end, and ahead.

The real step loop in the steady state of `step_host_time.py` (2 ends and 2 admissions in every step, prompts mostly
found in the prefix cache, frames encoded) over a stub device that takes `--step-us` per step and computes one after the
other, beside the host, as a GPU does. What it stands idle between two steps is time that no user gets back; the limit
is no idle time at all. The share of `--step-us` lost is what planning ahead is worth on a card with such steps.
Prints one JSON object; times in microseconds, medians over the steps.

    python tests/benchmarks/device_gap.py [--sequences 256] [--step-us 500 1000 4000]
"""

import argparse
import json
import time
from collections.abc import Callable

import numpy as np
from provenance import provenance
from step_host_time import Load, OneRouter, StubRunner, build_engine, settle

from penstock.workers.protocol import Generate
from penstock.workers.scheduler.plan import StepPlan, StepResult

_SPIN_S = 200e-6  # a sleep ends late by about as much


class PacedDevice(StubRunner):
    """Takes `step_s` per step; `gaps` are the seconds that it stood idle before each."""

    def __init__(self, step_s: float) -> None:
        super().__init__()
        self._step_s = step_s
        self._free_at = time.perf_counter()
        self.gaps: list[float] = []

    def start(self, plan: StepPlan) -> Callable[[], StepResult]:
        began = max(time.perf_counter(), self._free_at)
        self.gaps.append(began - self._free_at)
        self._free_at = done = began + self._step_s
        result = StepResult(self._tokens[: len(plan.sample_rows)])

        def wait() -> StepResult:
            while (left := done - time.perf_counter()) > 0:
                time.sleep(left - _SPIN_S if left > _SPIN_S else 0.0)
            return result

        return wait

    def run(self, plan: StepPlan) -> StepResult:
        return self.start(plan)()


def measure(load: Load, step_us: float, *, ahead: bool) -> dict[str, object]:
    """Idle microseconds per step in the steady state."""
    device, router = PacedDevice(step_us * 1e-6), OneRouter()
    engine = build_engine(load, router, device, device.start if ahead else None)
    arrivals = [load.requests(step) for step in range(load.warm_up + load.steps)]
    settle()
    for step, requests in enumerate(arrivals):
        if step == load.warm_up:
            device.gaps.clear()
        for index, request in requests:
            engine.post("router", Generate(index, 0, request))
        engine.step()
        router.outbox.take()
    gaps = np.array(device.gaps) * 1e6
    return {
        "planned": "ahead" if ahead else "after the end",
        "sequences": load.sequences,
        "step_us": step_us,
        "idle_median_us": round(float(np.median(gaps)), 1),
        "idle_p99_us": round(float(np.percentile(gaps, 99)), 1),
        "idle_share": round(float(gaps.sum() / (gaps.sum() + step_us * len(gaps))), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=256)
    parser.add_argument("--context", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--step-us", type=float, nargs="+", default=[500.0, 1000.0, 4000.0])
    arguments = parser.parse_args()
    load = Load("cached", arguments.sequences, arguments.context, arguments.steps)
    rows = [measure(load, step_us, ahead=ahead) for step_us in arguments.step_us for ahead in (False, True)]
    print(json.dumps({"what": "idle time of a device between steps", **provenance(), "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
