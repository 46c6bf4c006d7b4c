"""One model worker without processes: the real scheduler, block pool, prefix cache and runner, stepped by hand."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import numpy as np

from penstock.router.logprobs import PromptScores
from penstock.workers.frames import prompt_logprobs_of
from penstock.workers.kv.banks import make_banks
from penstock.workers.kv.device_storage import DeviceKVStorage
from penstock.workers.kv.layout import KVLayout
from penstock.workers.kv.storage import KVStorage
from penstock.workers.model_build import build_model_runner
from penstock.workers.protocol import EndReason, GenerateRequest, SamplingParams, Tokens
from penstock.workers.runner import ModelRunner
from penstock.workers.scheduler.adapters import Adapters
from penstock.workers.scheduler.events import RefusedEvent, SequenceKey, StepOutcome, Work
from penstock.workers.scheduler.grammars import Guides
from penstock.workers.scheduler.plan import StepPlan
from penstock.workers.scheduler.scheduler import Scheduler
from penstock.workers.settings import KVSettings, RunnerSettings, SchedulerSettings


@dataclass
class Output:
    """What one request got: tokens, per token (logprob, ((id, logprob), ...)) where asked, end."""

    start: int = 0  # index of the first token among the choice's generated ones
    tokens: list[int] = field(default_factory=list)
    logprobs: list[tuple[float, tuple[tuple[int, float], ...]]] = field(default_factory=list)
    end: EndReason = EndReason.NONE
    scores: PromptScores | None = None
    scored_pieces: int = 0
    embedding: np.ndarray | None = None


class InProcessWorker:
    """`generate` runs requests together to their ends; `on_plan` sees every plan before it runs."""

    def __init__(
        self,
        runner: ModelRunner,
        *,
        num_blocks: int = 512,
        prefix_caching: bool = True,
        scheduler: SchedulerSettings,
        on_plan: Callable[[StepPlan], None] | None = None,
        on_device: bool = False,
        banks: int = 1,
        grammars: Guides | None = None,
        adapters: Adapters | None = None,
    ) -> None:
        """`on_device`: the storage is a tensor on the runner's device, whatever that is.

        `banks` of `num_blocks` each, for a runner whose ranks attend for sequences of their own.
        """
        layout: KVLayout = runner.layout
        self.storage: KVStorage | DeviceKVStorage
        if on_device:
            self.storage = DeviceKVStorage.create(num_blocks, layout.block_bytes, runner.device)
        else:
            self.storage = KVStorage.create(num_blocks, layout.block_bytes)
        count = banks * num_blocks
        generations = self.storage.generations if banks == 1 else np.zeros(count, np.uint64)
        self.banks = make_banks(banks, num_blocks, generations, prefix_caching=prefix_caching)
        self.pool, self.cache = self.banks[0]
        self.scheduler = Scheduler(scheduler, layout, *self.banks, grammars=grammars, adapters=adapters)
        self.runner = runner
        self.on_plan = on_plan
        self.preemptions = 0
        self.cached_tokens = 0
        runner.attach(self.storage)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the storage back."""
        self.storage.close()

    def generate(self, requests: Sequence[GenerateRequest]) -> list[Output]:
        """Outputs in the order of requests. Raises RuntimeError where one is refused or nothing can go on."""
        outputs = [Output(start=len(request.emitted), scores=_scores(request)) for request in requests]
        for slot, request in enumerate(requests):
            self.scheduler.submit(SequenceKey("test", slot, 0), Work.GENERATE, request, now=0.0)
        while any(output.end is EndReason.NONE for output in outputs):
            plan = self.scheduler.plan(now=0.0)
            self._check_events()
            if plan is None and any(s.awaits_others for s in self.scheduler._roster.waiting.entries()):
                time.sleep(0.001)
                continue
            if plan is None:
                raise RuntimeError("nothing can be computed, but requests are open")
            if self.on_plan is not None:
                self.on_plan(plan)
            _take(self.scheduler.commit(plan, self.runner.run(plan), now=0.0), outputs)
        self.preemptions = self.scheduler.stats().preemptions
        self.scheduler.check_integrity()
        return outputs

    def greedy(self, prompts: Sequence[Tokens], count: int, *, logprobs: int | None = None) -> list[Output]:
        """`count` greedy tokens for every prompt."""
        sampling = SamplingParams(max_tokens=count, logprobs=logprobs)
        return self.generate([GenerateRequest(f"r{i}", prompt, sampling) for i, prompt in enumerate(prompts)])

    def _check_events(self) -> None:
        for event in self.scheduler.take_events():
            if isinstance(event, RefusedEvent):
                raise RuntimeError(f"{event.key} was refused: {event.message}")  # noqa: TRY004
            self.cached_tokens += getattr(event, "cached_tokens", 0)


def load_runner(model_dir: Path, *, dtype: str = "float32", threads: int = 1, **limits: int) -> ModelRunner:
    """The real loader; `limits` go to SchedulerSettings (max_model_len, ...), `block_size` to KVSettings.

    Unless told, the runner takes steps of any size that a test's scheduler plans.
    """
    limits = {"max_num_batched_tokens": 1 << 15, **limits}
    block_size = limits.pop("block_size", 16)
    settings = RunnerSettings(model_dir=str(model_dir), dtype=dtype, threads=threads)
    return build_model_runner(settings, KVSettings(block_size=block_size), SchedulerSettings(**limits))


def _scores(request: GenerateRequest) -> PromptScores | None:
    asked = request.sampling.prompt_logprobs
    return None if asked is None else PromptScores(len(request.prompt), asked)


def _take(outcome: StepOutcome, outputs: list[Output]) -> None:
    for chunk in outcome.scored:
        output = outputs[chunk.key.slot]
        if output.tokens or output.scores is None or not output.scores.apply(prompt_logprobs_of(chunk)):
            raise RuntimeError(f"request {chunk.key.slot}: scores from {chunk.start} on are out of place")
        output.scored_pieces += 1
    for key, values in outcome.embedded:
        outputs[key.slot].embedding = values
    for row, slot in enumerate(outcome.slots.tolist()):
        output = outputs[slot]
        if int(outcome.starts[row]) != output.start + len(output.tokens):
            raise RuntimeError(f"request {slot}: token {outcome.starts[row]} came after {len(output.tokens)}")
        output.tokens.append(int(outcome.tokens[row]))
        output.end = EndReason(int(outcome.ends[row]))
        found = outcome.logprobs
        if found is not None and not np.isnan(found.chosen[row]):
            top = [
                (int(found.top_ids[row, k]), float(found.top_logprobs[row, k])) for k in range(found.top_counts[row])
            ]
            output.logprobs.append((float(found.chosen[row]), tuple(top)))
