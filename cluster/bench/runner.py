"""Sends a planned load to a server and collects what came back.

Used by `commands/bench.py` and by scripts under `tests/benchmarks/`. Open loop by arrival times; a bound on
concurrency makes it closed: a request that may not start yet waits, and its clock starts when it is sent.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from penstock.cluster.bench.event_stream import Outcome, stream_completion
from penstock.cluster.bench.workload import Planned, Scaling, prompt_tokens


@dataclass(frozen=True, slots=True)
class Target:
    """Whom to ask, and how."""

    url: str
    model: str
    vocab_size: int
    api_key: str = field(default="", repr=False)
    max_concurrency: int | None = None
    timeout_s: float = 3600.0
    seed: int = 0
    scaling: Scaling = field(default_factory=Scaling)


async def run_load(
    target: Target, plan: Sequence[Planned], on_done: Callable[[Outcome], None]
) -> tuple[list[Outcome], float]:
    """All outcomes in plan order, and the seconds from the first send to the last answer."""
    gate = asyncio.Semaphore(target.max_concurrency or len(plan))
    prompts = [prompt_tokens(p, i, target.vocab_size, target.seed, target.scaling) for i, p in enumerate(plan)]
    start = time.perf_counter()

    async def one(number: int) -> Outcome:
        await asyncio.sleep(max(0.0, start + plan[number].at_s - time.perf_counter()))
        async with gate:
            body = {
                "model": target.model,
                "prompt": prompts[number],
                "max_tokens": plan[number].output_tokens,
                "ignore_eos": True,
                "temperature": 0,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
            outcome = await stream_completion(target.url, target.api_key, body, target.timeout_s)
        on_done(outcome)
        return outcome

    outcomes = await asyncio.gather(*(one(number) for number in range(len(plan))))
    return list(outcomes), time.perf_counter() - start
