#!/usr/bin/env python3
"""Check and time every operation of `penstock.kernels.ops` at serving shapes. Prints one JSON object.

    python tests/benchmarks/kernels.py [--out FILE] [--only GROUP ...] [--seconds 460]      on a GPU
    python tests/benchmarks/kernels.py --toy       every row at toy size on a CPU, under Triton's interpreter
    python tests/benchmarks/kernels.py --cpu [--tokens 32] [--context 320] [--dtype bfloat16] [--threads 2]

On a GPU each row is compared with float64 first (several kinds of input, and again the result of the last timed run),
then timed: 10 warm-ups, 50 runs, median, L2 overwritten before each, inputs of its own in each, CUDA events. `fraction`
is the speed-of-light bound over the median, the bound from the read, copy and bf16 matrix rates measured in this run;
`ratio` is a peer's median over ours. Under the interpreter nothing is timed: it shows that every row runs and is right.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

if "--toy" in sys.argv:  # before Triton and the kernels are imported
    os.environ |= {"TRITON_INTERPRET": "1", "PENSTOCK_KERNELS": "gpu"}

import torch
from kernel_bench import cpu_table, peers, rows_attention, rows_elementwise, rows_latent, rows_matrix, shapes, sol
from kernel_bench.correctness import RefusedError
from kernel_bench.problem import Problem, Row
from kernel_bench.timing import Clock, measured_rates
from provenance import provenance

# One multiplies codes made once, of another run's input; the other does not quantise the activations.
UNCHECKED_PEERS = ("scaled_mm", "cublas_bf16")


def all_rows(plan: shapes.Plan) -> list[Row]:
    """Attention first, then products, then the rest: what is cut when time is up comes last."""
    return [row for part in (rows_attention, rows_latent, rows_matrix, rows_elementwise) for row in part.rows(plan)]


def timed_row(row: Row, problem: Problem, clock: Clock, rates: sol.Rates) -> dict[str, object]:
    """Check, time, check what was timed; then the peers."""
    errors = {kind: round(problem.check(problem.call(problem.fresh(0, kind)), 0, kind), 3) for kind in problem.kinds}
    ours = clock.time(problem.call, problem.fresh)
    errors["timed"] = round(problem.check(ours.result, clock.runs - 1), 3)
    bound_us = rates.seconds(problem.cost, problem.speedup) * 1e6
    found: dict[str, object] = {
        "us": round(ours.median_us, 2),
        "spread": round(ours.spread, 3),
        "bound_us": round(bound_us, 2),
        "fraction": round(bound_us / ours.median_us, 3),
        "error_of_bound": errors,
    }
    seconds = ours.median_us * 1e-6
    if problem.cost.flops:
        found["tflops"] = round(problem.cost.flops / seconds / 1e12, 1)
    moved = problem.cost.read_bytes + problem.cost.written_bytes
    found["tbytes_per_s"] = round(moved / seconds / 1e12, 3)
    if sol.suspicious(ours.median_us, bound_us):
        found["suspicious"] = "faster than the bound: the bound or the timing is wrong"
    found["peers"] = {name: timed_peer(name, problem, clock, ours.median_us) for name in problem.peers}
    if problem.absent:
        found["absent"] = problem.absent
    return found


def timed_peer(name: str, problem: Problem, clock: Clock, ours_us: float) -> dict[str, object]:
    """Its median and the ratio to ours; what it computes is compared, and said where it is not the same."""
    try:
        theirs = clock.time(problem.peers[name], problem.fresh)
    except Exception as refusal:  # noqa: BLE001  # a peer that cannot run this shape is a row without it
        return {"failed": f"{type(refusal).__name__}: {refusal}"[:300]}
    found: dict[str, object] = {"us": round(theirs.median_us, 2), "ratio": round(theirs.median_us / ours_us, 3)}
    if name not in UNCHECKED_PEERS:
        try:
            problem.check(theirs.result, clock.runs - 1)
        except RefusedError as different:
            found["differs"] = str(different)[:200]
    return found


def on_gpu(only: list[str], seconds: float) -> dict[str, object]:
    """Every row until time is up, and the rates of the card."""
    began, device = time.monotonic(), torch.device("cuda")
    clock = Clock(device)
    rates = measured_rates(clock)
    found: dict[str, object] = {}
    for row in all_rows(shapes.REAL):
        if only and row.group not in only:
            continue
        if time.monotonic() - began > seconds:
            found[row.name] = {"skipped": "time is up"}
            continue
        try:
            with torch.inference_mode():
                found[row.name] = timed_row(row, row.make(device), clock, rates)
        except Exception as problem:  # noqa: BLE001  # one row's failure is its result, and the others go on
            found[row.name] = {"failed": f"{type(problem).__name__}: {problem}"[:500]}
        torch.cuda.empty_cache()
    after = measured_rates(clock, size=1 << 30)
    return {
        "device": torch.cuda.get_device_name(),
        "rates": {
            "read_tbytes_per_s": round(rates.read / 1e12, 3),
            "copy_tbytes_per_s": round(rates.copy / 1e12, 3),
            "bf16_tflops": round(rates.bf16_flops / 1e12, 1),
            "bf16_tflops_at_the_end": round(after.bf16_flops / 1e12, 1),
        },
        "seconds": round(time.monotonic() - began, 1),
        "rows": found,
    }


def toy(only: list[str]) -> dict[str, object]:
    """Every row at toy size: compared with float64, an operation's first row with every kind of input; not timed."""
    found: dict[str, object] = {}
    seen: set[str] = set()
    for row in all_rows(shapes.TOY):
        if only and row.group not in only:
            continue
        try:
            with torch.inference_mode():
                problem = row.make(torch.device("cpu"))
                kinds = problem.kinds[:1] if row.group in seen else problem.kinds
                seen.add(row.group)
                errors = {
                    kind: round(problem.check(problem.call(problem.fresh(1, kind)), 1, kind), 3) for kind in kinds
                }
            found[row.name] = {"group": row.group, "error_of_bound": errors, "absent": problem.absent}
        except Exception as problem_found:  # noqa: BLE001  # reported as the row's result
            found[row.name] = {"group": row.group, "failed": f"{type(problem_found).__name__}: {problem_found}"[:500]}
    return {"device": "interpreter", "rows": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--only", action="append", default=[], help="rows of these operations")
    parser.add_argument("--seconds", type=float, default=460.0, help="no row begins later than this")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--context", type=int, default=320)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    if args.cpu:
        torch.set_num_threads(args.threads)
        shape = {"tokens": args.tokens, "context": args.context, "dtype": args.dtype, "threads": args.threads}
        figures = {**shape, **cpu_table.table(args.tokens, args.context, getattr(torch, args.dtype))}
    elif args.toy:
        figures = toy(args.only)
    elif torch.cuda.is_available():
        figures = on_gpu(args.only, args.seconds)
    else:
        parser.error("there is no GPU here; --toy runs every row under the interpreter, --cpu times the CPU's backends")
    text = json.dumps({**figures, "libraries": dict(peers.versions()), "provenance": provenance()}, indent=1)
    if args.out:
        args.out.write_text(text + "\n", encoding="utf-8")
    print(text)
    failed = [name for name, row in figures.get("rows", {}).items() if "failed" in row]
    if failed:
        sys.exit(f"{len(failed)} rows failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
