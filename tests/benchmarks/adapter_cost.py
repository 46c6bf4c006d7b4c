"""What adapters cost a worker's decoding: tokens per second without, with one adapter, and with ever more in a batch.

    python tests/benchmarks/adapter_cost.py --model DIR [--rank 16] [--streams 1 16] [--tokens 48] [--json FILE]

One worker in this process with its real scheduler and runner, in bfloat16. The ways take turns, so that other load
meets all of them; medians. Beside each ratio to the model alone stands the least it could be where weights are all
that is read: the model's bytes over the model's and the used adapters'. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from provenance import provenance

sys.path.insert(0, str(Path(__file__).parents[1]))

from fakes.adapters import make_adapter
from fakes.in_process import InProcessWorker

from penstock.workers.adapter_ref import AdapterRef
from penstock.workers.lora.adapter_files import read_adapter
from penstock.workers.lora.projections import adaptable
from penstock.workers.lora.store import AdapterStore
from penstock.workers.model.config import read_config
from penstock.workers.model_build import build_model_runner
from penstock.workers.protocol import GenerateRequest, SamplingParams
from penstock.workers.settings import AdapterSettings, KVSettings, RunnerSettings, SchedulerSettings

PLACES = 16
PROMPT = 32
_WORD = 2  # bytes of a bfloat16


def measure(args: argparse.Namespace, home: Path) -> list[dict[str, Any]]:
    config = read_config(args.model)
    places = adaptable(config)
    refs = []
    for number in range(PLACES):
        make_adapter(home / str(number), config, rank=args.rank, seed=number, dtype="BF16", strength=0.1)
        revision = read_adapter(home, str(number), places, args.rank).revision
        refs.append(AdapterRef(str(number), str(number), revision))
    adapters = AdapterSettings(str(home), max_loaded=PLACES, max_rank=args.rank)
    scheduler = SchedulerSettings(max_num_seqs=64, max_num_batched_tokens=1024, max_model_len=512)
    runner = build_model_runner(
        RunnerSettings(model_dir=str(args.model), dtype="bfloat16", threads=args.threads),
        KVSettings(num_blocks=1024),
        scheduler,
        adapters=adapters,
    )
    if runner.adapters is None:
        raise SystemExit("the runner has no room for adapters")
    store = AdapterStore(adapters, places, runner.adapters, lambda: None)
    own = sum(file.stat().st_size for file in Path(args.model).glob("*.safetensors"))
    each = _WORD * args.rank * sum(size.inputs + size.outputs for size in places.values())
    rows = []
    with InProcessWorker(runner, num_blocks=1024, prefix_caching=False, scheduler=scheduler, adapters=store) as worker:
        for streams in args.streams:
            ways = [0, *(count for count in (1, 4, 16) if count <= streams)]
            rates: dict[int, list[float]] = {way: [] for way in ways}
            for turn in range(args.repeats + 1):
                for way in ways:
                    rate = _rate(worker, refs[:way], streams, args.tokens)
                    if turn:  # the first brings adapters to their places
                        rates[way].append(rate)
            alone = statistics.median(rates[0])
            for way in ways:
                rate = statistics.median(rates[way])
                floor = own / (own + way * each)
                row = {"streams": streams, "adapters": way, "tokens_per_s": round(rate, 1)}
                rows.append({**row, "of_the_model_alone": round(rate / alone, 3), "weights_alone": round(floor, 3)})
    store.stop()
    return rows


def _rate(worker: InProcessWorker, refs: list[AdapterRef], streams: int, tokens: int) -> float:
    requests = [
        GenerateRequest(
            f"{number}",
            tuple(7 + (number * 31 + i) % 900 for i in range(PROMPT)),
            SamplingParams(tokens),
            cache_prefix=False,
            adapter=refs[number % len(refs)] if refs else None,
        )
        for number in range(streams)
    ]
    began = time.perf_counter()
    outputs = worker.generate(requests)
    took = time.perf_counter() - began
    return sum(len(output.tokens) for output in outputs) / took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as home:
        rows = measure(args, Path(home))
    facts = {"what": "cost of adapters", "model": args.model.name, "rank": args.rank, "threads": args.threads}
    text = json.dumps({**facts, **provenance(), "rows": rows}, indent=2)
    print(text)
    if args.json is not None:
        args.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
