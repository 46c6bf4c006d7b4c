#!/usr/bin/env python3
"""Find the fastest configuration of every kernel at the benchmark's shapes, and write the table that serving reads.

    python tests/benchmarks/tune_kernels.py --out kernels/tune/h100.json [--kernel NAME ...] [--seconds 1500]
    python tests/benchmarks/tune_kernels.py --out kernels/tune/h100.json --defaults      with no GPU: untuned defaults

Each candidate is compiled ahead of time first; one that spills or takes more than the card has is never run. What is
run is compared with float64, then timed as `kernels.py` times. Searches take turns by what they promise to save.
`--defaults` writes the shapes alone: entries without numbers, which leave every launch to the kernels' heuristics.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from kernel_bench import rows_attention, rows_elementwise, rows_latent, rows_matrix, shapes
from kernel_bench.correctness import RefusedError
from kernel_bench.defaults import untuned_keys
from kernel_bench.problem import Row
from kernel_bench.search import TRIALS, Search, next_task
from kernel_bench.sol import Rates
from kernel_bench.space import SPACES, Config, Space
from kernel_bench.timing import Clock, measured_rates
from provenance import provenance

RUNS = 20
# Rows whose searches take turns; their tensors are on the card at the same time.
AT_ONCE = 4
UNTUNED = "untuned defaults: entries without numbers leave the launch to the kernel's heuristic; nothing was measured"


@dataclasses.dataclass(slots=True)
class Task:
    """One kernel at one shape."""

    kernel: str
    key: dict[str, int]
    search: Search
    bound: float  # seconds
    gain: float = 1.0

    @property
    def fraction(self) -> float:
        """Of the bound, by the best so far."""
        ran = [seconds for _, seconds in self.search.found.trials if seconds is not None]
        return self.bound / min(ran) if ran else 0.0

    def advance(self, most: int) -> None:
        """One round; `gain` is what it improved, relatively."""
        before = self.fraction
        self.search.round(most)
        self.gain = max(0.0, self.fraction - before) / self.fraction if self.fraction else 1.0

    def entry(self) -> dict[str, object]:
        """For the table."""
        config, _ = self.search.found.best
        return {"key": self.key, "config": config, "fraction": round(self.fraction, 3)}


def compiles(space: Space, config: Config, target: str) -> bool:
    """Whether every case of the space compiles with this configuration, spills nothing and fits."""
    from penstock.kernels.gpu.aot import all_cases
    from penstock.kernels.gpu.resource_usage import compile_case

    cases = all_cases()
    for name in space.cases:
        case = cases[name]
        own = {each: value for each, value in config.items() if each in case.constexprs}
        laid = dataclasses.replace(
            case,
            constexprs={**case.constexprs, **own},
            num_warps=config["num_warps"],
            num_stages=config["num_stages"],
        )
        try:
            usage = compile_case(laid, target)
        except Exception:  # noqa: BLE001  # what the compiler refuses cannot be used, whatever it says
            return False
        if usage.over(target) or usage.spilled_bytes:
            return False
    return True


def make_task(row: Row, device: torch.device, clock: Clock, rates: Rates, target: str, seed: int) -> Task | None:
    """A search for this row's shape; None where the call asks for no configuration of this kernel."""
    from penstock.kernels.gpu.tuning import trying

    kernel, space = row.kernel, SPACES[row.kernel]
    # What peers prepared is not needed, and large.
    problem = dataclasses.replace(row.make(device), peers={})
    with trying(kernel, {}) as trial:
        problem.call(problem.fresh(0))
    if not trial.asked:
        return None
    key, default = trial.asked[0]
    configs = space.configs(key)
    if not configs:
        return None

    def measure(config: Config) -> float | None:
        try:
            with trying(kernel, config):
                problem.check(problem.call(problem.fresh(0)), 0)
                return clock.time(problem.call, problem.fresh).median_us * 1e-6
        except (RefusedError, RuntimeError, ValueError):  # a wrong result, or one the card refuses to launch
            return None

    chosen = {name: value for name, value in default.items() if name in space.values}
    search = Search(
        configs,
        measure,
        accept=lambda config: compiles(space, config, target),
        features=lambda config: space.features(config, key),
        start=[chosen],
        seed=seed,
    )
    return Task(kernel, key, search, rates.seconds(problem.cost, problem.speedup))


def tune(wanted: list[str], seconds: float, trials: int, seed: int) -> dict[str, object]:
    """The table of this GPU."""
    from triton.runtime import driver

    from penstock.kernels.gpu.resource_usage import TARGETS

    began, device = time.monotonic(), torch.device("cuda")
    current = driver.active.get_current_target()
    target = next(
        (name for name, each in TARGETS.items() if (each.backend, each.arch) == (current.backend, current.arch)), ""
    )
    if not target:
        raise SystemExit(f"no ahead-of-time target for {current}")
    clock = Clock(device, warm_ups=3, runs=RUNS)
    rates = measured_rates(clock)
    plan = shapes.REAL
    rows = [row for part in (rows_attention, rows_latent, rows_matrix, rows_elementwise) for row in part.rows(plan)]
    rows = [row for row in rows if row.kernel in SPACES and (not wanted or row.kernel in wanted)]
    done: dict[str, list[Task]] = {}
    known: set[tuple[str, str]] = set()
    for begin in range(0, len(rows), AT_ONCE):
        left = seconds - (time.monotonic() - began)
        if left <= 0:
            break
        until = time.monotonic() + left * AT_ONCE / (len(rows) - begin)
        with torch.inference_mode():
            made = (make_task(row, device, clock, rates, target, seed) for row in rows[begin : begin + AT_ONCE])
            tasks = {(task.kernel, str(task.key)): task for task in made if task is not None}
            tasks = {name: task for name, task in tasks.items() if name not in known}
            known |= tasks.keys()
            run_tasks(list(tasks.values()), trials, until)
        for task in tasks.values():
            if task.fraction:
                done.setdefault(task.kernel, []).append(task)
        del tasks
        torch.cuda.empty_cache()
    return {
        "gpu": torch.cuda.get_device_name(),
        "measured": True,
        "rates": {"read": rates.read, "copy": rates.copy, "bf16_flops": rates.bf16_flops},
        "kernels": {
            kernel: section(kernel, [task.entry() for task in tasks]) for kernel, tasks in sorted(done.items())
        },
    }


def run_tasks(tasks: list[Task], trials: int, until: float) -> None:
    """Rounds go to the task that promises most, until all have had their trials or time is up."""
    while time.monotonic() < until:
        open_tasks = [task for task in tasks if len(task.search.found.trials) < trials and task.search.left]
        if not open_tasks:
            return
        slowest = [task.bound / task.fraction if task.fraction else task.bound for task in open_tasks]
        number = next_task(slowest, [task.fraction for task in open_tasks], [task.gain for task in open_tasks])
        open_tasks[number].advance(trials - len(open_tasks[number].search.found.trials))


def section(kernel: str, entries: list[dict[str, object]]) -> dict[str, object]:
    """One kernel's part of the table."""
    match = list(SPACES[kernel].match) if kernel in SPACES else []
    return {"match": match, "entries": entries}


def defaults() -> dict[str, object]:
    """The benchmark's shapes as a table without numbers, which leaves every launch to the kernels' heuristics."""
    found: dict[str, list[dict[str, object]]] = {}
    for kernel, key in untuned_keys(shapes.REAL):
        entry = {"key": key, "config": {}, "fraction": None}
        known = found.setdefault(kernel, [])
        if entry not in known:
            known.append(entry)
    kernels = {kernel: section(kernel, entries) for kernel, entries in sorted(found.items())}
    return {"gpu": "h100", "measured": False, "note": UNTUNED, "kernels": kernels}


def merged(old: Mapping[str, object], new: dict[str, object]) -> dict[str, object]:
    """`new` over `old`: kernels that were not tuned now keep their entries, where those were measured too."""
    before, after = old.get("kernels"), new["kernels"]
    if not old.get("measured") or not isinstance(before, dict) or not isinstance(after, dict):
        return new
    return {**new, "kernels": dict(sorted({**before, **after}.items()))}


def written(table: Mapping[str, object]) -> str:
    """As JSON with one entry a line."""
    text = json.dumps(table, indent=1)
    return (
        re.sub(r"\{\s+\"key\".*?\"fraction\": [^\n]+\s+\}", lambda match: " ".join(match[0].split()), text, flags=re.S)
        + "\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--kernel", action="append", default=[], choices=sorted(SPACES))
    parser.add_argument("--seconds", type=float, default=1500.0)
    parser.add_argument("--trials", type=int, default=TRIALS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--defaults", action="store_true")
    args = parser.parse_args()
    if args.defaults:
        table = defaults()
    elif torch.cuda.is_available():
        import triton

        table = {**tune(args.kernel, args.seconds, args.trials, args.seed), "triton": triton.__version__}
        table["provenance"] = provenance()
        if args.out.exists():
            table = merged(json.loads(args.out.read_text(encoding="utf-8")), table)
    else:
        parser.error("there is no GPU here to measure on; --defaults writes untuned defaults")
    args.out.write_text(written(table), encoding="utf-8")


if __name__ == "__main__":
    main()
