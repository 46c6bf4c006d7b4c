"""Decode steps of one model by a tensor-parallel group beside one rank: processes with one thread each, over Gloo.

Every rank is a process of its own that builds the real runner and runs the same plans: `--rows` sequences of
`--context` tokens, then `--steps` steps of one token each. No scheduler and no channel: what is timed is a step of rank
0, sampling included. The parent runs width 1, then `--width`, `--repeat` times in turn, and prints one JSON object:
milliseconds of the median step, their ratio, and in float32 whether the sampled tokens are the same.

    python tests/benchmarks/tensor_parallel.py MODEL_DIR [--width 2] [--rows 1,8] [--dtype bfloat16] [--realtime]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass

import numpy as np
import torch
from provenance import provenance

from penstock.workers.kv.storage import KVStorage
from penstock.workers.model_build import build_model_runner
from penstock.workers.parallel.process_group import GroupPlace, join_store, open_group, serve_store
from penstock.workers.scheduler.plan import SamplingBatch, StepPlan
from penstock.workers.settings import KVSettings, RunnerSettings, SchedulerSettings

_BLOCK = 16
_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Case:
    """What one group of processes runs."""

    model_dir: str
    width: int
    rows: int
    dtype: str
    context: int
    steps: int
    realtime: bool


def make_plan(case: Case, start: int, tokens: np.ndarray) -> StepPlan:
    """All rows get `tokens` [rows, n] at position `start` and sample greedily."""
    rows, count = tokens.shape
    width = -(-(case.context + case.steps) // _BLOCK)
    return StepPlan(
        step=0,
        slots=np.arange(rows, dtype=np.int32),
        starts=np.full(rows, start, np.int32),
        offsets=np.arange(rows + 1, dtype=np.int32) * count,
        token_ids=tokens.astype(np.int32).ravel(),
        block_tables=np.arange(rows * width, dtype=np.int32).reshape(rows, width),
        sample_rows=np.arange(rows, dtype=np.int32),
        sampling=SamplingBatch(
            temperature=np.zeros(rows, np.float32),
            top_k=np.zeros(rows, np.int32),
            top_p=np.ones(rows, np.float32),
            min_p=np.zeros(rows, np.float32),
            seed=np.zeros(rows, np.uint64),
            choice=np.zeros(rows, np.int32),
            position=np.full(rows, start + count, np.int32),
            logprobs=np.full(rows, -1, np.int32),
        ),
        num_decode=rows if count == 1 else 0,
    )


def run_rank(case: Case, rank: int, address: str) -> None:
    """One rank; rank 0 prints the address first, and the result last."""
    store = None
    if case.width > 1 and rank == 0:
        store, address = serve_store("127.0.0.1", _TIMEOUT_S)
        print(address, flush=True)
    elif case.width > 1:
        store = join_store(address, _TIMEOUT_S)
    group = open_group(GroupPlace("bench", rank, case.width, timeout_s=_TIMEOUT_S), store)
    settings = RunnerSettings(model_dir=case.model_dir, dtype=case.dtype, threads=1)
    length = case.context + case.steps
    scheduler = SchedulerSettings(
        max_model_len=length + _BLOCK, max_num_seqs=case.rows, max_num_batched_tokens=case.rows * case.context
    )
    runner = build_model_runner(settings, KVSettings(block_size=_BLOCK), scheduler, group=group)
    storage = KVStorage.create(case.rows * -(-length // _BLOCK), runner.layout.block_bytes)
    runner.attach(storage)
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, runner.vocab_size, (case.rows, case.context))
    fed = rng.integers(0, runner.vocab_size, (case.steps, case.rows, 1))
    sampled, seconds = [runner.run(make_plan(case, 0, prompts)).token_ids], []
    if case.realtime:
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(5))
    for step in range(case.steps):
        plan = make_plan(case, case.context + step, fed[step])
        group.barrier()
        began = time.perf_counter()
        sampled.append(runner.run(plan).token_ids)
        seconds.append(time.perf_counter() - began)
    group.barrier()
    if case.realtime:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    runner.detach()
    storage.close()
    if rank == 0:
        print(json.dumps({"seconds": seconds, "tokens": np.concatenate(sampled).tolist()}), flush=True)
    group.close()


def run_group(case: Case) -> tuple[float, list[int]]:
    """(median seconds of a step, all sampled tokens)."""
    values = [case.model_dir, "--case", json.dumps(dataclasses.astuple(case)[1:])]
    command = [sys.executable, __file__, *values]
    first = subprocess.Popen([*command, "--rank", "0"], stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None
    others = []
    if case.width > 1:
        address = first.stdout.readline().strip()
        others = [
            subprocess.Popen([*command, "--rank", str(rank), "--address", address]) for rank in range(1, case.width)
        ]
    try:
        found = json.loads(first.communicate(timeout=_TIMEOUT_S)[0])
    finally:
        for process in (first, *others):
            process.kill()
            process.wait()
    return statistics.median(found["seconds"]), found["tokens"]


def compare(arguments: argparse.Namespace) -> list[dict[str, object]]:
    """One entry for each dtype and number of rows."""
    results: list[dict[str, object]] = []
    for dtype in arguments.dtype.split(","):
        for rows in map(int, arguments.rows.split(",")):
            shape = (rows, dtype, arguments.context, arguments.steps, arguments.realtime)
            taken: dict[int, list[float]] = {1: [], arguments.width: []}
            tokens: dict[int, list[int]] = {}
            for _ in range(arguments.repeat):
                for width in taken:
                    median, tokens[width] = run_group(Case(arguments.model_dir, width, *shape))
                    taken[width].append(median)
            alone, together = min(taken[1]), min(taken[arguments.width])
            entry = {"dtype": dtype, "rows": rows, "width": arguments.width, "ratio": round(alone / together, 3)}
            entry |= {"ms_alone": round(alone * 1e3, 3), "ms_together": round(together * 1e3, 3)}
            if dtype == "float32":
                entry["same_tokens"] = tokens[1] == tokens[arguments.width]
            results.append(entry)
    return results


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_dir")
    parser.add_argument("--width", type=int, default=2)
    parser.add_argument("--rows", default="1,8")
    parser.add_argument("--dtype", default="float32,bfloat16")
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--realtime", action="store_true", help="of the timed steps, where others use the machine")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--address", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.case:
        run_rank(Case(arguments.model_dir, *json.loads(arguments.case)), arguments.rank, arguments.address)
        return
    model = os.path.basename(os.path.normpath(arguments.model_dir))
    print(json.dumps({**provenance(), "model": model, "results": compare(arguments)}, indent=1))


if __name__ == "__main__":
    main()
