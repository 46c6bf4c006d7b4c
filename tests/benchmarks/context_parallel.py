"""Time to the first token of a long prompt: two ranks that compute it together beside one rank alone.

    python tests/benchmarks/context_parallel.py MODEL_DIR [--tokens 4096] [--ranks 2] [--repeats 7] [--json FILE]

Real worker processes and the real router, without Ray and HTTP; every rank has one thread. The same prompts, of random
tokens and computed in one step, go to both workers in turns: whole, and with their first half in the prefix cache.
Prints one JSON object: of each the median seconds of both workers and their ratio, which is the speed-up of the whole
request; the bar for two ranks and a whole prompt is 1.5.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import time
from pathlib import Path

from provenance import provenance

from penstock.cluster.local import LocalCluster
from penstock.workers.protocol import GenerateRequest, Role, SamplingParams
from penstock.workers.settings import GroupSettings, KVSettings, RunnerSettings, SchedulerSettings, WorkerSettings

_KEY = "5d" * 32


def worker(args: argparse.Namespace, ranks: int) -> WorkerSettings:
    """A mixed worker of so many ranks, with room for two prompts."""
    length = args.tokens + 16
    return WorkerSettings(
        worker_id=f"mixed-{ranks}",
        role=Role.MIXED,
        cluster_key=_KEY,
        scheduler=SchedulerSettings(max_num_seqs=4, max_num_batched_tokens=length, max_model_len=length),
        kv=KVSettings(num_blocks=4 * (length // 16 + 1), prefix_caching=True),
        runner=RunnerSettings(model_dir=str(args.model), dtype=args.dtype, threads=1),
        group=GroupSettings(context_parallel_size=ranks, context_parallel_threshold=args.tokens // 4),
    )


async def first_token(cluster: LocalCluster, prompt: tuple[int, ...], cached: int) -> tuple[float, int]:
    """(seconds until the first token, that token); `cached` leading tokens have been computed before."""
    if cached:
        await first_token(cluster, prompt[:cached], 0)
    began = time.perf_counter()
    request = GenerateRequest("r", prompt, SamplingParams(max_tokens=1))
    tokens = [token async for delta in cluster.generator.submit(request) for token in delta.tokens]
    return time.perf_counter() - began, tokens[0]


async def compare(
    args: argparse.Namespace, alone: LocalCluster, together: LocalCluster, draw: random.Random, cached: int
) -> dict[str, object]:
    """One prompt at a time, by one rank and by all in turns; the first of each is not counted."""
    vocab = json.loads((args.model / "config.json").read_text())["vocab_size"]
    prompts = [tuple(draw.randrange(vocab) for _ in range(args.tokens)) for _ in range(args.repeats + 1)]
    seconds: dict[int, list[float]] = {1: [], args.ranks: []}
    same = 0
    for number, prompt in enumerate(prompts):
        answers = []
        for ranks, cluster in ((1, alone), (args.ranks, together)):
            took, token = await first_token(cluster, prompt, cached)
            answers.append(token)
            if number:
                seconds[ranks].append(took)
        same += answers[0] == answers[1]
    medians = {ranks: statistics.median(found) for ranks, found in seconds.items()}
    return {
        "cached_tokens": cached,
        "seconds_one_rank": round(medians[1], 4),
        f"seconds_{args.ranks}_ranks": round(medians[args.ranks], 4),
        "speed_up": round(medians[1] / medians[args.ranks], 3),
        "same_first_tokens": f"{same} of {len(prompts)}",
    }


async def measure(args: argparse.Namespace) -> dict[str, object]:
    """Whole prompts, and those of which the cache has the first half."""
    draw = random.Random(0)
    async with LocalCluster([worker(args, 1)]) as alone, LocalCluster([worker(args, args.ranks)]) as together:
        rows = [await compare(args, alone, together, draw, cached) for cached in (0, args.tokens // 2)]
    return {"rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    facts = {"what": "context-parallel prefill", "model": args.model.name, "tokens": args.tokens, "dtype": args.dtype}
    text = json.dumps({**facts, **provenance(), **asyncio.run(measure(args))}, indent=2)
    print(text)
    if args.json is not None:
        args.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
