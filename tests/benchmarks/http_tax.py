"""What Ray, HTTP and text cost: the same split workers asked in process, and through `penstock serve`, in turn.

    python tests/benchmarks/http_tax.py --model DIR [--rounds 3] [--json FILE]

Both sides: one prefill and one decode worker with one thread each, prefix caching as shipped, greedy, random prompts.
Reported: median time to first token at concurrency 1 and output tokens/s at concurrency 32 on each side, per round and
as medians; the tax is their difference and ratio. The load client runs on the same machine in both cases.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.provenance import provenance
from fakes.launched_cluster import LaunchedCluster

from penstock.cluster.bench.runner import Target, run_load
from penstock.cluster.bench.workload import fixed_plan, prompt_tokens
from penstock.cluster.config import ClusterIdentity, load_config, worker_settings
from penstock.cluster.local import LocalCluster
from penstock.cluster.settings import ClusterConfig
from penstock.workers.protocol import GenerateRequest, Role, SamplingParams


@dataclasses.dataclass(frozen=True)
class Load:
    """What is asked of both sides."""

    single_requests: int
    batch_requests: int
    concurrency: int
    input_tokens: int
    output_tokens: int


def configuration(model: Path, load: Load) -> dict[str, Any]:
    return {
        "runner.model_dir": str(model),
        "runner.threads": 1,
        "front.skip_tokenizer_init": True,
        "front.served_model_name": ("bench",),
        "scheduler.max_model_len": 2 * (load.input_tokens + load.output_tokens),
        "scheduler.reserve_tokens": load.output_tokens,
        "kv.memory_bytes": 512 << 20,
        "router.placement.local_prefill_tokens": 0,
    }


def summary(ttfts: list[float], tokens: int, seconds: float) -> dict[str, float]:
    return {"ttft_ms": 1000 * statistics.median(ttfts), "output_tok_s": tokens / seconds}


async def bare_side(config: ClusterConfig, load: Load, vocab: int, seed: int) -> dict[str, float]:
    identity = ClusterIdentity("bench", "cd" * 32)
    workers = [worker_settings(config, role, 0, identity) for role in (Role.PREFILL, Role.DECODE)]
    cluster = LocalCluster(workers, config.router, log_file=Path(tempfile.gettempdir()) / "penstock-bare.log")
    plan = fixed_plan(load.batch_requests, load.input_tokens, load.output_tokens, [0.0] * load.batch_requests)
    prompts = [tuple(prompt_tokens(p, i, vocab, seed)) for i, p in enumerate(plan)]

    async def one(name: str, prompt: tuple[int, ...], output: int, gate: asyncio.Semaphore) -> tuple[float, int]:
        async with gate:
            sent, first, count = time.perf_counter(), 0.0, 0
            request = GenerateRequest(name, prompt, SamplingParams(max_tokens=output))
            async for delta in cluster.generator.submit(request):
                first = first or time.perf_counter() - sent
                count += len(delta.tokens)
            return first, count

    async with cluster:
        gate = asyncio.Semaphore(load.concurrency)
        await asyncio.gather(*(one(f"w{i}", p[::-1], 8, gate) for i, p in enumerate(prompts[:8])))
        ttfts = [(await one(f"s{i}", p[1:] + p[:1], 2, gate))[0] for i, p in enumerate(prompts[: load.single_requests])]
        begin = time.perf_counter()
        done = await asyncio.gather(*(one(f"b{i}", p, load.output_tokens, gate) for i, p in enumerate(prompts)))
        return summary(ttfts, sum(count for _, count in done), time.perf_counter() - begin)


async def http_side(url: str, load: Load, vocab: int, seed: int) -> dict[str, float]:
    async def ask(count: int, output: int, concurrency: int, seed: int) -> tuple[list[Any], float]:
        plan = fixed_plan(count, load.input_tokens, output, [0.0] * count)
        run = await run_load(Target(url, "bench", vocab, max_concurrency=concurrency, seed=seed), plan, lambda _: None)
        failed = [outcome.error for outcome in run.outcomes if outcome.error]
        if failed:
            raise RuntimeError(failed[0])
        return run.outcomes, run.duration_s

    await ask(8, 8, 8, seed + 2)
    singles, _ = await ask(load.single_requests, 2, 1, seed + 1)
    batch, seconds = await ask(load.batch_requests, load.output_tokens, load.concurrency, seed)
    return summary([o.ttft_s for o in singles], sum(o.output_tokens for o in batch), seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--single-requests", type=int, default=30)
    parser.add_argument("--batch-requests", type=int, default=96)
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--input", type=int, default=128)
    parser.add_argument("--output", type=int, default=128)
    parser.add_argument("--json", type=Path, help="write the result there too")
    args = parser.parse_args()
    load = Load(args.single_requests, args.batch_requests, args.concurrency, args.input, args.output)
    values = configuration(args.model, load)
    config = load_config(values=values, environment={})
    vocab = int(json.loads((args.model / "config.json").read_text())["vocab_size"])

    rounds: list[dict[str, dict[str, float]]] = []
    for number in range(args.rounds):
        bare = asyncio.run(bare_side(config, load, vocab, 100 * number))
        with tempfile.TemporaryDirectory() as folder:
            cluster = LaunchedCluster(Path(folder), values)
            try:
                cluster.wait_ready(120)
                http = asyncio.run(http_side(cluster.url, load, vocab, 100 * number))
                cluster.terminate()
            finally:
                cluster.end()
        rounds.append({"bare": bare, "http": http})
        print(f"round {number + 1}: bare {bare}, http {http}", file=sys.stderr)

    def median(side: str, key: str) -> float:
        return statistics.median(r[side][key] for r in rounds)

    result = {
        "what": "HTTP and Ray tax",
        **provenance(),
        "load": dataclasses.asdict(load),
        "model": args.model.name,
        "rounds": rounds,
        "ttft_bare_ms": median("bare", "ttft_ms"),
        "ttft_http_ms": median("http", "ttft_ms"),
        "ttft_tax_ms": statistics.median(r["http"]["ttft_ms"] - r["bare"]["ttft_ms"] for r in rounds),
        "throughput_bare_tok_s": median("bare", "output_tok_s"),
        "throughput_http_tok_s": median("http", "output_tok_s"),
        "throughput_ratio": statistics.median(r["http"]["output_tok_s"] / r["bare"]["output_tok_s"] for r in rounds),
    }
    text = json.dumps(result, indent=1)
    print(text)
    if args.json:
        args.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
