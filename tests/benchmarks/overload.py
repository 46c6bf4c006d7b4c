"""Three times more requests than a cluster can serve, over HTTP: who is admitted is served in time, others hear so.

    python tests/benchmarks/overload.py [--seconds 60] [--model DIR] [--json FILE]

The cluster is the product's: worker processes, and an ingress process with router, HTTP application and listener
(`overload_ingress.py`); Ray only starts them elsewhere, so it is left out. Workers are oracles with a step time of
their own, or, with `--model`, one worker over a real checkpoint. Arrivals do not wait for answers.

    unloaded   one request at a time: what an answer takes
    capacity   as many as the cluster takes at once: what it can serve
    overload   `--factor` times that rate; then one request by itself
    tenants    one tenant at five times its fair share, another at half of it (both are half of the capacity)

Targets: 2 s to the first token, twice the unloaded time per token. Refusals: an HTTP error before the first token.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import random
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.overload_ingress import KEYS, OverloadedCluster, Shape
from benchmarks.provenance import provenance

from penstock.cluster.bench.event_stream import Outcome, stream_completion

TTFT_TARGET_S, TPOT_FACTOR = 2.0, 2.0
GATE_SHARE = 0.8  # of the target per token, what the gate is told to keep batches to


@dataclasses.dataclass
class Timed:
    """One request: how it went, and how long a refusal took."""

    outcome: Outcome
    ended_s: float

    @property
    def served(self) -> bool:
        return not self.outcome.error

    @property
    def refused(self) -> bool:
        return self.outcome.error.startswith(("HTTP 429", "HTTP 503")) and not self.outcome.chunks


class Source:
    """Sends requests of one tenant; every prompt is new."""

    def __init__(self, url: str, shape: Shape, tenant: str = "a") -> None:
        self._url, self._shape, self._key = url, shape, KEYS[tenant]
        self._random = random.Random(tenant)

    async def one(self) -> Timed:
        shape = self._shape
        prompt = [self._random.randrange(1, shape.vocab) for _ in range(shape.prompt_tokens)]
        output = self._random.randint(shape.output_tokens // 2, shape.output_tokens * 3 // 2)
        body = {"model": "bench", "prompt": prompt, "max_tokens": output, "temperature": 0, "stream": True}
        body |= {"ignore_eos": True, "stream_options": {"include_usage": True}}
        began = time.perf_counter()
        outcome = await stream_completion(self._url, self._key, json.dumps(body).encode(), 60.0)
        return Timed(outcome, time.perf_counter() - began)

    async def open_loop(self, rate: float, seconds: float) -> list[Timed]:
        """Poisson arrivals."""
        tasks: list[asyncio.Task[Timed]] = []
        began, due = time.perf_counter(), 0.0
        while due < seconds:
            await asyncio.sleep(max(0.0, began + due - time.perf_counter()))
            tasks.append(asyncio.create_task(self.one()))
            due += self._random.expovariate(rate)
        return [await task for task in tasks]

    async def closed_loop(self, streams: int, seconds: float) -> float:
        """Requests per second that end while so many run all the time."""
        ended: list[float] = []
        began = time.perf_counter()

        async def stream() -> None:
            while time.perf_counter() - began < seconds:
                if (await self.one()).served:
                    ended.append(time.perf_counter() - began)

        await asyncio.gather(*(stream() for _ in range(streams)))
        warm_s = seconds / 3
        return sum(warm_s < at <= seconds for at in ended) / (seconds - warm_s)


def summary(timed: Sequence[Timed], tpot_target_s: float) -> dict[str, Any]:
    """The figures of one phase."""
    served = [each.outcome for each in timed if each.served]
    refused = [each.ended_s for each in timed if each.refused]
    ttft = [outcome.ttft_s for outcome in served]
    tpot = [outcome.tpot_s for outcome in served]
    kept = sum(a <= TTFT_TARGET_S and b <= tpot_target_s for a, b in zip(ttft, tpot, strict=True))
    return {
        "requests": len(timed),
        "served": len(served),
        "refused": len(refused),
        "failed": [each.outcome.error for each in timed if not each.served and not each.refused][:5],
        "ttft_kept": share(sum(value <= TTFT_TARGET_S for value in ttft), len(served)),
        "tpot_kept": share(sum(value <= tpot_target_s for value in tpot), len(served)),
        "both_kept": share(kept, len(served)),
        "ttft_s": quantiles(ttft),
        "tpot_s": quantiles(tpot),
        "refusal_s": quantiles(refused),
        "refused_within_1_s": share(sum(value <= 1.0 for value in refused), len(refused)),
    }


def share(part: int, whole: int) -> float | None:
    return round(part / whole, 4) if whole else None


def quantiles(values: Sequence[float]) -> dict[str, float]:
    ordered = sorted(values)
    at = {"median": 0.5, "p95": 0.95, "p99": 0.99, "worst": 1.0}
    return {name: round(ordered[min(len(ordered) - 1, int(q * len(ordered)))], 4) for name, q in at.items() if ordered}


async def alone(source: Source, requests: int) -> tuple[float, float]:
    """Seconds to the first token and per token of one request at a time."""
    timed = [await source.one() for _ in range(requests)][1:]
    return statistics.median(t.outcome.ttft_s for t in timed), statistics.median(t.outcome.tpot_s for t in timed)


async def measure(cluster: OverloadedCluster, shape: Shape, seconds: float, factor: float) -> dict[str, Any]:
    """All phases against a running cluster."""
    source = Source(cluster.url, shape)
    unloaded, tpot_s = await alone(source, shape.unloaded_requests)
    target_s = TPOT_FACTOR * tpot_s
    capacity = await source.closed_loop(shape.saturating_streams, max(6.0, seconds / 4))
    await asyncio.sleep(1.0)
    before = cluster.memory()
    rushed = await source.open_loop(factor * capacity, seconds)
    during = cluster.memory()
    first_after = await source.one()
    flood, fair = Source(cluster.url, shape, "flood"), Source(cluster.url, shape, "fair")
    both = await asyncio.gather(flood.open_loop(2.5 * capacity, seconds), fair.open_loop(0.25 * capacity, seconds))
    return {
        "unloaded": {"ttft_s": round(unloaded, 4), "tpot_s": round(tpot_s, 5)},
        "capacity_per_s": round(capacity, 2),
        "overload": summary(rushed, target_s) | {"factor": factor, "seconds": seconds},
        "goodput_of_capacity": round(sum(each.served for each in rushed) / seconds / capacity, 3),
        "memory_mb": {"before": before, "after": during},
        "first_after": {"ttft_s": round(first_after.outcome.ttft_s, 4), "error": first_after.outcome.error},
        "tenants": {"flood": summary(both[0], target_s), "fair": summary(both[1], target_s)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--factor", type=float, default=3.0)
    parser.add_argument("--model", type=Path, help="a checkpoint; without, oracles with a step time")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    shape = Shape.of_model(args.model) if args.model else Shape()
    if not shape.tpot_target_s:  # of a checkpoint: what this machine takes for a token is looked up first
        with OverloadedCluster(shape) as cluster:
            _, tpot_s = asyncio.run(alone(Source(cluster.url, shape), shape.unloaded_requests))
        shape = dataclasses.replace(shape, tpot_target_s=round(GATE_SHARE * TPOT_FACTOR * tpot_s, 5))
    with OverloadedCluster(shape) as cluster:
        figures = asyncio.run(measure(cluster, shape, args.seconds, args.factor))
    figures |= {"shape": dataclasses.asdict(shape) | {"model": args.model.name if args.model else ""}, **provenance()}
    text = json.dumps(figures, indent=2)
    print(text)
    if args.json:
        args.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
