"""Sends a planned load to a server and collects what came back.

Used by `commands/bench.py` and by scripts under `tests/benchmarks/`. Open loop: a request goes out at its time whatever
the backlog, with its body encoded before the run begins. A bound on concurrency makes it closed: a request that may
not start yet waits, and its clock starts when it is sent. A conversation's next turn waits for the answer it follows.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from penstock.cluster.bench.event_stream import Outcome, stream_completion
from penstock.cluster.bench.workload import Planned, prompt_tokens


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


@dataclass(slots=True)
class Run:
    """All outcomes in plan order, the prompts that were sent, and seconds from the first send to the last answer."""

    outcomes: list[Outcome]
    prompts: list[list[int]]
    duration_s: float


async def run_load(target: Target, plan: Sequence[Planned], on_done: Callable[[Outcome], None]) -> Run:
    """Send everything; returns when the last answer is read. Failures are outcomes, never raised."""
    load = _Load(target, plan, on_done)
    start = time.perf_counter()
    outcomes = await asyncio.gather(*(load.one(number, start) for number in range(len(plan))))
    return Run(list(outcomes), load.prompts, time.perf_counter() - start)


class _Load:
    """One run's prompts, and who waits for whom."""

    def __init__(self, target: Target, plan: Sequence[Planned], on_done: Callable[[Outcome], None]) -> None:
        self._target = target
        self._plan = plan
        self._on_done = on_done
        self._gate = asyncio.Semaphore(target.max_concurrency or len(plan))
        self._followed = {planned.after for planned in plan if planned.after is not None}
        self._answered = {number: asyncio.Event() for number in self._followed}
        self._answers: dict[int, list[int]] = {}
        self.prompts = [prompt_tokens(p, i, target.vocab_size, target.seed) for i, p in enumerate(plan)]
        self._bodies = {i: self._body(i) for i, planned in enumerate(plan) if planned.after is None}

    async def one(self, number: int, start: float) -> Outcome:
        """One request from its time to its end."""
        planned = self._plan[number]
        scheduled = start + planned.at_s
        if planned.after is not None:
            await self._answered[planned.after].wait()
            scheduled = max(scheduled, time.perf_counter() + planned.think_s)
            self.prompts[number] = self.prompts[planned.after] + self._answers[planned.after] + self.prompts[number]
        await asyncio.sleep(max(0.0, scheduled - time.perf_counter()))
        async with self._gate:
            body = self._bodies.pop(number, None) or self._body(number)
            outcome = await stream_completion(self._target.url, self._target.api_key, body, self._target.timeout_s)
        outcome.scheduled = scheduled
        if number in self._followed:
            self._answers[number] = outcome.token_ids
            self._answered[number].set()
        outcome.token_ids = []
        self._on_done(outcome)
        return outcome

    def _body(self, number: int) -> bytes:
        body = {
            "model": self._target.model,
            "prompt": self.prompts[number],
            "max_tokens": self._plan[number].output_tokens,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if number in self._followed:
            body["return_token_ids"] = True
        return json.dumps(body).encode()
