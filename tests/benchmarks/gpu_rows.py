"""The rows of `engine_gpu.py` for one model: decode steps, recordings, offline workloads, host time per step."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from benchmarks.gpu_limits import (
    ModelSize,
    Rates,
    decode_step_s,
    overlapped_tokens_s,
    synchronize,
    workload_s,
)
from fakes.in_process import InProcessWorker

from penstock.workers.protocol import GenerateRequest, SamplingParams
from penstock.workers.runner import Launched, ModelRunner
from penstock.workers.scheduler.events import SequenceKey, Work
from penstock.workers.scheduler.plan import SamplingBatch, StepPlan

Workload = Sequence[tuple[int, int]]  # (input, output) tokens of each request
DECODE_HEAVY = "128/2048"
_STEPS = 20


@dataclass
class Bench:
    """One model on one device, and how long it may take; `deadline` on `time.monotonic`."""

    worker: InProcessWorker
    size: ModelSize
    rates: Rates
    deadline: float

    @property
    def runner(self) -> ModelRunner:
        """The worker's."""
        return self.worker.runner

    @property
    def left_s(self) -> float:
        """Until the deadline."""
        return self.deadline - time.monotonic()


def decode_plan(worker: InProcessWorker, batch: int, context: int, seed: int = 0) -> StepPlan | None:
    """A step that decodes one token for each of `batch` sequences of `context`; None where the pool is too small."""
    block_size = worker.runner.layout.block_size
    width = -(-(context + 1) // block_size)
    if batch * width > worker.storage.num_blocks:
        return None
    rng = np.random.default_rng(seed)
    tables = rng.permutation(worker.storage.num_blocks)[: batch * width].reshape(batch, width)
    zeros, real = np.zeros(batch, np.int32), np.zeros(batch, np.float32)
    starts = np.full(batch, context, np.int32)
    return StepPlan(
        step=1,
        slots=np.arange(batch, dtype=np.int32),
        starts=starts,
        offsets=np.arange(batch + 1, dtype=np.int32),
        token_ids=rng.integers(0, worker.runner.vocab_size, batch).astype(np.int32),
        block_tables=tables.astype(np.int32),
        sample_rows=np.arange(batch, dtype=np.int32),
        sampling=SamplingBatch(real, zeros, real + 1, real, np.zeros(batch, np.uint64), zeros, starts + 1, zeros - 1),
        num_decode=batch,
    )


def decode_rows(bench: Bench, batches: Sequence[int], context: int, steps: int = _STEPS) -> list[dict[str, object]]:
    """Per batch size: an eager step, the capture, a replayed step, whether both agree bit for bit, and the limit."""
    rows: list[dict[str, object]] = []
    for batch in batches:
        row: dict[str, object] = {"batch": batch, "context": context}
        rows.append(row)
        plan = decode_plan(bench.worker, batch, context)
        if plan is None or bench.left_s < 0:
            row["skipped"] = "no time left" if plan is not None else "the KV pool does not hold these sequences"
            continue
        limit = decode_step_s(bench.size, bench.rates, [context + 1] * batch)
        row["limit_ms"] = _ms(limit)
        eager, _ = _timed_steps(bench, plan, steps)
        row["eager_ms"] = _ms(eager)
        best = eager
        graphs = bench.runner.graphs
        bucket = graphs.bucket_of(plan) if graphs is not None else None
        if graphs is not None and bucket is not None:
            best = min(best, _replay_row(bench, plan, bucket, steps, eager, row))
        row["of_limit"] = round(limit / best, 3)
        row["tokens_s"] = round(batch / best, 1)
    return rows


def _replay_row(bench: Bench, plan: StepPlan, bucket: int, steps: int, eager: float, row: dict[str, object]) -> float:
    graphs, device = bench.runner.graphs, bench.runner.device
    if graphs is None:
        return eager
    synchronize(device)
    begin = time.perf_counter()
    with torch.inference_mode():
        captured = bucket in graphs.buckets or graphs.capture(bucket)
    row["capture_s"] = round(time.perf_counter() - begin, 4)
    if not captured:
        row["skipped_replay"] = "the step could not be captured; see the log"
        return eager
    with torch.inference_mode():
        expected = graphs.padded(plan, bucket).clone()
        found = graphs.replay(plan, bucket)
        synchronize(device)
        row["replay_equals_eager"] = found is not None and bool(torch.equal(found, expected))
    replay, launch = _timed_steps(bench, plan, steps)
    row |= {"replay_ms": _ms(replay), "host_launch_us": round(launch * 1e6, 1), "gain": round(eager / replay, 3)}
    return replay


def _timed_steps(bench: Bench, plan: StepPlan, steps: int) -> tuple[float, float]:
    """Median seconds of a step, and of the call that starts it."""
    runner = bench.runner
    for _ in range(2):
        runner.run(plan)
    whole, launches = [], []
    for _ in range(steps):
        begin = time.perf_counter()
        launched = runner.launch(plan)
        launches.append(time.perf_counter() - begin)
        runner.collect(launched)
        whole.append(time.perf_counter() - begin)
    return statistics.median(whole), statistics.median(launches)


def record_all(bench: Bench) -> dict[str, object]:
    """Capture every bucket; what a restart with a record does in idle moments."""
    graphs = bench.runner.graphs
    if graphs is None:
        return {"skipped": "no recorder on this device"}
    begin, failed = time.perf_counter(), 0
    with torch.inference_mode():
        for bucket in reversed(graphs.table.sizes):
            if bucket not in graphs.buckets and bench.left_s > 0:
                failed += not graphs.capture(bucket)
    return {"buckets": len(graphs.buckets), "failed": failed, "seconds": round(time.perf_counter() - begin, 2)}


@dataclass
class HostTimes:
    """Seconds of each part of every step."""

    plan: list[float]
    launch: list[float]
    wait: list[float]
    commit: list[float]

    def take(self, seconds: Sequence[float]) -> None:
        """One step's parts, in order."""
        for column, each in zip((self.plan, self.launch, self.wait, self.commit), seconds, strict=True):
            column.append(each)

    def row(self) -> dict[str, float]:
        """Medians in microseconds; `host` is all but the wait for the device."""
        host = [sum(parts) for parts in zip(self.plan, self.launch, self.commit, strict=True)]
        named = {"plan": self.plan, "launch": self.launch, "wait": self.wait, "commit": self.commit, "host": host}
        found = {f"{name}_us": round(statistics.median(times) * 1e6, 1) for name, times in named.items()}
        return {**found, "host_p99_us": round(float(np.quantile(host, 0.99)) * 1e6, 1)}


def offline_row(bench: Bench, name: str, workload: Workload) -> dict[str, object]:
    """Output tokens/s with all requests there from the start, beside the limits."""
    limit = workload_s(bench.size, bench.rates, workload)
    outputs, inputs = sum(output for _, output in workload), sum(tokens for tokens, _ in workload)
    row: dict[str, object] = {
        "workload": name,
        "requests": len(workload),
        "input_tokens": inputs,
        "output_tokens": outputs,
        "limit_output_tok_s": round(outputs / limit, 1),
        "overlap_limit_tok_s": round(overlapped_tokens_s(bench.size, bench.rates), 1),
    }
    if bench.left_s < 1.5 * limit:
        return {**row, "skipped": f"no time left: {bench.left_s:.0f} s, and the limit alone is {limit:.0f} s"}
    taken, steps, times = _serve(bench, _requests(bench, workload, seed=0))
    if name == DECODE_HEAVY and bench.left_s > 2 * taken:
        slower, _, _ = _serve(bench, _requests(bench, workload, seed=1), ahead=False)
        row["planned_after_the_end_output_tok_s"] = round(outputs / slower, 1)
    replayed = bench.runner.graphs is not None
    return {
        **row,
        "seconds": round(taken, 3),
        "steps": steps,
        "output_tok_s": round(outputs / taken, 1),
        "total_tok_s": round((inputs + outputs) / taken, 1),
        "of_limit": round(limit / taken, 3),
        "recorded_steps": replayed,
        "host": times.row(),
    }


def _requests(bench: Bench, workload: Workload, seed: int) -> list[GenerateRequest]:
    """Of these lengths; other seeds share no prefix."""
    rng, vocab = random.Random(seed), bench.runner.vocab_size
    return [
        GenerateRequest(f"r{i}", tuple(rng.randrange(vocab) for _ in range(tokens)), SamplingParams(max_tokens=output))
        for i, (tokens, output) in enumerate(workload)
    ]


def _serve(bench: Bench, requests: Sequence[GenerateRequest], *, ahead: bool = True) -> tuple[float, int, HostTimes]:
    """Run the requests to their ends as the step loop does; (seconds, steps, host times). RuntimeError if stuck.

    `ahead`: each step is planned and launched while the one before runs.
    """
    worker, times = bench.worker, HostTimes([], [], [], [])
    scheduler, runner = worker.scheduler, bench.runner
    for slot, request in enumerate(requests):
        scheduler.submit(SequenceKey("bench", slot, 0), Work.GENERATE, request, now=0.0)
    ended, steps, begin = 0, 0, time.perf_counter()
    under_way: list[tuple[StepPlan, Launched]] = []
    while ended < len(requests):
        at = [time.perf_counter()]
        plan = scheduler.plan(now=0.0)
        scheduler.take_events()
        if plan is None and not under_way:
            raise RuntimeError("nothing can be computed, but requests are open")
        at.append(time.perf_counter())
        if plan is not None:
            under_way.append((plan, runner.launch(plan)))
        at.append(time.perf_counter())
        if plan is not None and ahead and len(under_way) == 1:
            continue
        oldest, launched = under_way.pop(0)
        result = runner.collect(launched)
        at.append(time.perf_counter())
        outcome = scheduler.commit(oldest, result, now=0.0)
        at.append(time.perf_counter())
        ended += int(np.count_nonzero(outcome.ends))
        steps += 1
        times.take(np.diff(at).tolist())
    for plan, launched in under_way:  # computed past the last end
        scheduler.commit(plan, runner.collect(launched), now=0.0)
    return time.perf_counter() - begin, steps, times


def workloads(toy: bool) -> dict[str, Workload]:
    """The usual four; the last is nano-vllm's own, which draws its lengths between the prompts' tokens."""
    if toy:
        return {"6/3": [(6, 3)] * 3, "mixed": [(5, 2), (9, 3), (3, 4)]}
    rng = random.Random(0)
    inputs = []
    for _ in range(256):
        inputs.append(rng.randint(100, 1024))
        for _ in range(inputs[-1]):
            rng.randint(0, 10000)
    uniform = [(tokens, rng.randint(100, 1024)) for tokens in inputs]
    return {
        "1024/512": [(1024, 512)] * 128,
        "256 uniform 100-1024": uniform,
        "2048/128": [(2048, 128)] * 128,
        "128/2048": [(128, 2048)] * 128,
    }


def guarded(work: Callable[[], Any]) -> Any:
    """The result, or why there is none: one failing row must not cost the others."""
    try:
        return work()
    except Exception as error:  # noqa: BLE001 - the edge of a row
        return {"failed": f"{type(error).__name__}: {error}"}


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 4)
