"""One model of `engine_gpu.py`, in a process of its own; writes its part of the result after every row."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from benchmarks.gpu_limits import Rates, decode_step_s, measure_rates, synchronize
from benchmarks.gpu_models import MODELS, TOYS, random_runner, size_of
from benchmarks.gpu_rows import Bench, decode_rows, guarded, offline_row, record_all, workloads
from fakes.in_process import InProcessWorker
from fakes.rerun_recorder import RerunRecorder

from penstock.workers.device import CudaMemory, device_facts
from penstock.workers.device_pool import PoolWish, profile
from penstock.workers.errors import PenstockError
from penstock.workers.graphs.capture import CudaRecorder, Recorder
from penstock.workers.runner import ModelRunner
from penstock.workers.settings import KVSettings, SchedulerSettings

BATCHES, CONTEXT = (1, 2, 4, 8, 16, 32, 64, 128, 256), 1024
TOY_BATCHES, TOY_CONTEXT = (1, 3), 10
_MODEL_LEN, _STEP_TOKENS, _SEQUENCES = 2304, 8192, 256


class Part:
    """The result so far, on disk after every `put`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.content: dict[str, Any] = {}

    def put(self, name: str, value: object) -> None:
        """Set one entry."""
        self.content[name] = value
        draft = self._path.with_suffix(".tmp")
        draft.write_text(json.dumps(self.content))
        draft.replace(self._path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--spawned-at", type=float, required=True)
    parser.add_argument("--deadline", type=float, required=True)
    parser.add_argument("--toy", action="store_true")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    part = Part(args.out)
    raw = (TOYS if args.toy else MODELS)[args.name]
    if not args.toy and not torch.cuda.is_available():
        part.put("skipped", "no GPU is visible to this process")
        return
    device = torch.device("cpu") if args.toy else torch.device("cuda", 0)
    try:
        worker, start = _start(args, raw, device)
    except (PenstockError, torch.OutOfMemoryError) as error:
        part.put("skipped", f"{type(error).__name__}: {error}")
        return
    part.put("device", _describe(device))
    part.put("start", start)
    rates = _rates(device, toy=args.toy)
    part.put("rates", {"bf16_flop_s": rates.matrix, "read_bytes_s": rates.read, "copy_bytes_s": rates.copy})
    bench = Bench(worker, size_of(raw), rates, args.deadline)
    part.put("weights_over_read_rate_ms", round(decode_step_s(bench.size, rates, [0]) * 1e3, 4))
    batches, context = (TOY_BATCHES, TOY_CONTEXT) if args.toy else (BATCHES, CONTEXT)
    part.put("decode", guarded(lambda: decode_rows(bench, batches, context, 2 if args.toy else 20)))
    part.put("captures", guarded(lambda: record_all(bench)) if not args.toy else {"skipped": "toy"})
    offline: dict[str, object] = {}
    for name, workload in workloads(args.toy).items():
        offline[name] = guarded(lambda name=name, workload=workload: offline_row(bench, name, workload))
        part.put("offline", offline)


def _start(
    args: argparse.Namespace, raw: dict[str, Any], device: torch.device
) -> tuple[InProcessWorker, dict[str, object]]:
    """From nothing to the first token, phase by phase."""
    imported = time.monotonic()
    scheduler = SchedulerSettings(
        max_num_seqs=4 if args.toy else _SEQUENCES,
        max_num_batched_tokens=16 if args.toy else _STEP_TOKENS,
        max_model_len=32 if args.toy else _MODEL_LEN,
        max_waiting=1024,
        reserve_tokens=256,
    )
    recorder: Recorder = RerunRecorder() if args.toy else CudaRecorder(device)
    runner = random_runner(raw, device, scheduler, recorder)
    synchronize(device)
    loaded = time.monotonic()
    num_blocks = 24 if args.toy else _blocks(runner)
    worker = InProcessWorker(runner, num_blocks=num_blocks, prefix_caching=False, scheduler=scheduler, on_device=True)
    sized = time.monotonic()
    worker.greedy([tuple(range(1, 1 + (8 if args.toy else 128)))], 1)
    first = time.monotonic()
    phases = {
        "process_and_imports_s": imported - args.spawned_at,
        "weights_s": loaded - imported,
        "profile_and_pool_s": sized - loaded,
        "first_step_s": first - sized,
        "start_to_first_token_s": first - args.spawned_at,
    }
    found: dict[str, object] = {name: round(seconds, 3) for name, seconds in phases.items()}
    return worker, {**found, "kv_blocks": num_blocks, "kv_bytes": num_blocks * runner.layout.block_bytes}


def _blocks(runner: ModelRunner) -> int:
    wish = PoolWish(KVSettings(), runner.layout.blocks_for(_MODEL_LEN), "")
    return profile(runner, wish, CudaMemory(runner.device)).num_blocks


def _rates(device: torch.device, *, toy: bool) -> Rates:
    return measure_rates(device, size=64, num_bytes=1 << 16) if toy else _measured(device)


def _measured(device: torch.device) -> Rates:
    """With less memory where the pool left little."""
    free = torch.cuda.mem_get_info(device)[0]
    return measure_rates(
        device, size=8192 if free > 1 << 30 else 4096, num_bytes=min(2 << 30, free // 3 // 4096 * 4096)
    )


def _describe(device: torch.device) -> dict[str, object]:
    facts = device_facts(device)
    return {"name": facts.name, "driver": facts.driver, "libraries": dict(facts.libraries)}


if __name__ == "__main__":
    main()
