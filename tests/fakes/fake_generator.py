"""A `Generator` that follows a script, for tests of the HTTP front."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from penstock.cluster.status import WorkerStatus
from penstock.router.emission import Delta, TokenLogprob
from penstock.router.trail import Trail
from penstock.workers.errors import RefusedError
from penstock.workers.protocol import EndReason, FailureCode, GenerateRequest, Role

Step = Delta | Exception | float  # what to hand out, what to raise, how long to sleep
Script = Callable[[GenerateRequest], Iterable[Step]]  # read lazily, one step per delta


def deltas(
    tokens: Sequence[int], end: EndReason = EndReason.LENGTH, size: int = 1, logprobs: int | None = None
) -> list[Step]:
    """`tokens` in deltas of `size`; the last one carries `end`."""
    steps: list[Step] = []
    for start in range(0, len(tokens), size):
        piece = tuple(tokens[start : start + size])
        entries = None
        if logprobs is not None:
            entries = tuple(
                TokenLogprob(-0.5 * t, tuple((t + i, -0.5 * t - i) for i in range(logprobs))) for t in piece
            )
        last = start + size >= len(tokens)
        steps.append(Delta(piece, entries, end if last else EndReason.NONE))
    return steps


def echo(request: GenerateRequest) -> list[Step]:
    """The prompt backwards, over and over, up to max_tokens, each choice one further on."""
    source = request.prompt[::-1]
    shift = request.sampling.choice
    tokens = [source[(i + shift) % len(source)] for i in range(request.sampling.max_tokens)]
    return deltas(tokens, logprobs=request.sampling.logprobs)


def fake_scores(request: GenerateRequest) -> tuple[TokenLogprob | None, ...]:
    """Prompt logprobs -0.25 * id, with `prompt_logprobs` alternatives; None for the first token."""
    count = request.sampling.prompt_logprobs or 0
    scores = [TokenLogprob(-0.25 * t, tuple((t + i, -0.25 * t - i) for i in range(count))) for t in request.prompt[1:]]
    return (None, *scores)


class FakeGeneration:
    def __init__(self, request: GenerateRequest, script: Script, on_cancel: Callable[[], None], cached: int) -> None:
        self._steps = iter(script(request))
        self._on_cancel = on_cancel
        self._ended = False
        self.cached_tokens = cached
        self.trail = Trail()
        asked = request.sampling.prompt_logprobs
        self.prompt_logprobs: tuple[TokenLogprob | None, ...] = () if asked is None else fake_scores(request)
        self.embedding = np.arange(1, 5, dtype=np.float32) if request.embed else None

    def __aiter__(self) -> FakeGeneration:
        return self

    async def __anext__(self) -> Delta:
        while True:
            step = next(self._steps, None)
            if step is None or self._ended:
                raise StopAsyncIteration
            if isinstance(step, float):
                await asyncio.sleep(step)
                continue
            if isinstance(step, Exception):
                self._ended = True
                raise step
            await asyncio.sleep(0)
            self._ended = step.end is not EndReason.NONE
            return step

    def finish(self) -> None:
        self.cancel()

    def cancel(self) -> None:
        if not self._ended:
            self._ended = True
            self._on_cancel()


@dataclass
class FakeGenerator:
    script: Script = echo
    cached: int = 0
    submitted: list[GenerateRequest] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    embeds: bool = True
    full_for: frozenset[str] = frozenset()  # tenants that are refused

    def check(self, tenant: str) -> None:
        if tenant in self.full_for:
            raise RefusedError(FailureCode.OVERLOADED, "the request would begin too late", 3.0)

    def submit(self, request: GenerateRequest) -> FakeGeneration:
        self.submitted.append(request)
        generation = FakeGeneration(
            request, self.script, lambda: self.cancelled.append(request.request_id), self.cached
        )
        if not self.embeds:
            generation.embedding = None
        return generation


@dataclass
class FakeFleet:
    reason: str = ""
    statuses: list[WorkerStatus] = field(
        default_factory=lambda: [
            WorkerStatus("prefill-0", Role.PREFILL, 1, (11,), "ready", kv_blocks=100, kv_free_blocks=75, running=2),
            WorkerStatus("decode-0", Role.DECODE, 1, (12,), "ready", kv_blocks=100, kv_free_blocks=100, age_s=0.25),
        ]
    )

    def workers(self) -> list[WorkerStatus]:
        return self.statuses

    def unready(self) -> str:
        return self.reason
