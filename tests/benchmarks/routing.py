"""Routing of a trace slice over several oracle workers: cache hits against an endless cache, and how even the load is.

    python tests/benchmarks/routing.py --trace FILE.jsonl --requests 2000 --length-divisor 16 --time-stretch 0.1

Workers are real processes with their own KV pools and prefix caches; the router sees what it sees in service. The
oracle computes nothing but takes `--token-us` for every token, so queues build up as they would. Open loop.

    hit rate    prompt tokens found in the cache of the worker that the router chose / prompt tokens
    bound       the same for one endless cache that sees every prompt in order of arrival
    imbalance   most loaded worker / mean, where load = prompt tokens computed + tokens generated

Every text is checked against the oracle's own.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

from provenance import provenance

from penstock.cluster.bench.ideal_cache import infinite_cache_tokens
from penstock.cluster.bench.traces import Scaling, Slice, read_trace
from penstock.cluster.bench.workload import Planned, prompt_tokens
from penstock.cluster.local import LocalCluster
from penstock.router.journey import RequestReport
from penstock.router.settings import PlacementSettings, RouterSettings
from penstock.workers.kv.prefix_cache import chain_digests
from penstock.workers.oracle import expected_tokens
from penstock.workers.protocol import GenerateRequest, Role, SamplingParams
from penstock.workers.settings import KVSettings, RunnerSettings, SchedulerSettings, WorkerSettings

VOCAB = 32000
KEY = "cd" * 32
ROOT = b"\3" * 32


def fleet(args: argparse.Namespace, longest: int) -> list[WorkerSettings]:
    """Workers that compute prompts: `--workers` mixed ones, or that many prefill workers and as many to decode."""
    roles = [Role.MIXED] if not args.split else [Role.PREFILL, Role.DECODE]
    base = WorkerSettings(
        worker_id="",
        cluster_key=KEY,
        scheduler=SchedulerSettings(max_num_batched_tokens=args.chunk, max_model_len=longest + 1),
        kv=KVSettings(block_size=16, num_blocks=args.num_blocks),
        runner=RunnerSettings(
            kind="oracle", oracle_vocab=VOCAB, oracle_step_s=0.002, oracle_token_s=args.token_us * 1e-6
        ),
    )
    return [replace(base, worker_id=f"{role.value}-{i}", role=role) for role in roles for i in range(args.workers)]


class Replay:
    """One run: requests out on time, texts checked, reports collected."""

    def __init__(self, plan: list[Planned], args: argparse.Namespace) -> None:
        self.plan = plan
        self.prompts = [tuple(prompt_tokens(p, i, VOCAB, args.seed)) for i, p in enumerate(plan)]
        self.reports: list[RequestReport] = []
        self.wrong = 0
        self.lag_s: list[float] = []
        self._args = args

    async def run(self) -> float:
        """Seconds from the first send to the last answer."""
        longest = max(len(prompt) + p.output_tokens for prompt, p in zip(self.prompts, self.plan, strict=True))
        placement = PlacementSettings(
            policy=self._args.policy, queue_weight=self._args.queue_weight, balance=self._args.balance
        )
        router = RouterSettings(placement=placement)
        cluster = LocalCluster(fleet(self._args, longest), router, observe=self.reports.append)
        requests = [self._request(number) for number in range(len(self.plan))]
        async with cluster:
            start = time.perf_counter()
            await asyncio.gather(*(self._one(cluster, request, i, start) for i, request in enumerate(requests)))
            return time.perf_counter() - start

    def _request(self, number: int) -> GenerateRequest:
        prompt = self.prompts[number]
        sampling = SamplingParams(max_tokens=self.plan[number].output_tokens)
        digests = chain_digests(ROOT, prompt, 16)
        return GenerateRequest(f"r{number}", prompt, sampling, prefix_root=ROOT, prefix_digests=digests)

    async def _one(self, cluster: LocalCluster, request: GenerateRequest, number: int, start: float) -> None:
        await asyncio.sleep(max(0.0, start + self.plan[number].at_s - time.perf_counter()))
        self.lag_s.append(time.perf_counter() - start - self.plan[number].at_s)
        tokens: list[int] = []
        async for delta in cluster.generator.submit(request):
            tokens += delta.tokens
        self.wrong += tuple(tokens) != expected_tokens(request.prompt, request.sampling, VOCAB)

    def figures(self, duration_s: float) -> dict[str, object]:
        """What the run is summed up in."""
        found, total = infinite_cache_tokens(self.prompts, 16)
        cached = sum(report.cached_tokens for report in self.reports)
        computed: Counter[str] = Counter()
        load: Counter[str] = Counter()
        for report in self.reports:
            worker = report.prefill_worker or report.decode_worker or ""
            computed[worker] += report.prompt_tokens - report.cached_tokens
            load[worker] += report.prompt_tokens - report.cached_tokens
            load[report.decode_worker or worker] += report.generated_tokens
        pool = [worker.worker_id for worker in fleet(self._args, 1) if worker.role is not Role.DECODE]
        waits = sorted(report.times.get("first_token", 0.0) for report in self.reports)
        self.lag_s.sort()
        return {
            "requests": len(self.plan),
            "wrong_texts": self.wrong,
            "prompt_tokens": total,
            "hit_rate": cached / total,
            "infinite_cache_hit_rate": found / total,
            "of_infinite": cached / max(1, found),
            "of_infinite_predicted": sum(report.predicted_cached_tokens or 0 for report in self.reports)
            / max(1, found),
            "imbalance_load": max(load[name] for name in pool) * len(pool) / sum(load[name] for name in pool),
            "imbalance_prefill": max(computed[name] for name in pool) * len(pool) / sum(computed[n] for n in pool),
            "duration_s": duration_s,
            "p99_send_lag_ms": self.lag_s[int(0.99 * (len(self.lag_s) - 1))] * 1000,
            "median_first_token_s": waits[len(waits) // 2],
            "p95_first_token_s": waits[int(0.95 * (len(waits) - 1))],
            "moves": sum(report.moves for report in self.reports),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, required=True)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--start", type=float, default=0.0)
    parser.add_argument("--length-divisor", type=float, default=16.0)
    parser.add_argument("--time-stretch", type=float, default=0.1)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--split", action="store_true", help="as many decode workers beside them")
    parser.add_argument("--policy", default="prefix_load")
    parser.add_argument("--queue-weight", type=float, default=PlacementSettings().queue_weight)
    parser.add_argument("--balance", type=float, default=PlacementSettings().balance)
    parser.add_argument("--chunk", type=int, default=512)
    parser.add_argument("--num-blocks", type=int, default=1 << 17)
    parser.add_argument("--token-us", type=float, default=50.0, help="oracle time per token computed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    scaling = Scaling(args.length_divisor, args.time_stretch)
    trace = read_trace(args.trace, Slice(args.requests, args.start), scaling, args.seed)
    replay = Replay(list(trace.plan), args)
    duration_s = asyncio.run(replay.run())
    stated = {k: v for k, v in vars(args).items() if k not in ("json", "trace")} | {"trace": args.trace.name}
    result = {**provenance(), "settings": stated, **replay.figures(duration_s)}
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
