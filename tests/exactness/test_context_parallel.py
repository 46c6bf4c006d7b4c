"""Long prompts that several ranks compute together, against transformers: every family, at once and chunk by chunk,
with beginnings found in the cache and after preemption."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from fakes.exactness import CheckpointSpec
from fakes.expert_rank_threads import SpreadRunner
from fakes.in_ci import every
from fakes.in_process import InProcessWorker, Output
from fakes.sharded_specs import sharded_specs

from penstock.workers.expert_ranks import ExpertSpread
from penstock.workers.parallel.context_parallel import ContextExchange, SharedChunk
from penstock.workers.protocol import GenerateRequest, SamplingParams, Tokens
from penstock.workers.settings import SchedulerSettings

SPECS = sharded_specs()
MAX_MODEL_LEN = 512
Checkpoints = Callable[[CheckpointSpec], Any]


@dataclass(frozen=True)
class Way:
    """How prompts are computed."""

    tensor: int
    ranks: int
    budget: int  # tokens of a step
    threshold: int
    caching: bool = True
    preempt: bool = False  # banks too small for all that run
    spread: bool = False  # experts lie on one rank each
    rows: int = 16  # sequences of a step

    def __str__(self) -> str:
        words = [f"{self.tensor}x{self.ranks}-budget{self.budget}-from{self.threshold}"]
        return "-".join(words + ["cache"] * self.caching + ["preempt"] * self.preempt + ["spread"] * self.spread)


WAYS = [
    Way(1, 2, 512, 48),
    Way(1, 3, 96, 40, preempt=True),
    Way(1, 4, 512, 64),
    Way(2, 2, 128, 32),
    Way(1, 2, 128, 32, preempt=True),
    Way(1, 4, 96, 40, rows=2),
]
EVERY_WAY = [
    Way(1, ranks, budget, 32, caching, preempt)
    for ranks, budget, caching, preempt in itertools.product((2, 3, 4), (96, 512), (True, False), (True, False))
]


def way_of(number: int, spec: CheckpointSpec, ways: list[Way]) -> Way:
    spread = spec.family in ("qwen3-moe", "deepseek-v3")
    return dataclasses.replace(ways[number % len(ways)], spread=spread)


def long_prompts(vocab: int, copies: int = 1) -> list[Tokens]:
    """Lengths on and off the borders of blocks, pieces and chunks; some begin alike."""
    lengths = copies * [300, 31, 257, 96, 8, 191, 48, 300, 130]
    first = [n % 3 + n // 9 * 5 for n in range(len(lengths))]
    return [
        tuple((7 * i * i + 3 * i + n) % (vocab - 3) for i in range(length))
        for n, length in zip(first, lengths, strict=True)
    ]


def follow_ups(prompts: list[Tokens], outputs: list[Output], vocab: int) -> list[Tokens]:
    """The conversations go on: what was asked and answered lies in a bank, and most of it is found there."""
    asked = zip(prompts, outputs, itertools.cycle((70, 101, 48, 0)), strict=False)
    return [
        prompt + tuple(output.tokens) + tuple((5 * i + n) % (vocab - 3) for i in range(more))
        for n, (prompt, output, more) in enumerate(asked)
    ]


@dataclass
class Seen:
    """What rank 0 shared, step by step."""

    steps: list[list[SharedChunk]] = field(default_factory=list)

    @property
    def chunks(self) -> list[SharedChunk]:
        return [chunk for chunks in self.steps for chunk in chunks]


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> Seen:
    seen = Seen()
    inner = ContextExchange.__init__

    def note(self: Any, group: Any, chunks: Any, *rest: Any) -> None:
        if group.rank == 0:
            seen.steps.append(list(chunks))
        inner(self, group, chunks, *rest)

    monkeypatch.setattr(ContextExchange, "__init__", note)
    return seen


def run(model: Any, way: Way, prompts: list[Tokens], **sampling: Any) -> list[tuple[list[Tokens], list[Output]]]:
    """Prompts and outputs of a first round and, with a cache, of one that goes on from it."""
    spread = ExpertSpread(rebalance_steps=0) if way.spread else None
    settings = SchedulerSettings(
        max_model_len=MAX_MODEL_LEN,
        max_num_batched_tokens=way.budget,
        max_num_seqs=way.rows,
        reserve_tokens=0 if way.preempt else MAX_MODEL_LEN,
        watermark=0.0 if way.preempt else 0.01,
    )
    params = SamplingParams(max_tokens=40 if way.preempt else 8, **sampling)

    def ask(every: list[Tokens]) -> list[Output]:
        return worker.generate([GenerateRequest(f"r{n}", prompt, params) for n, prompt in enumerate(every)])

    limits = {"max_model_len": MAX_MODEL_LEN, "max_num_seqs": way.rows}
    with SpreadRunner(model.directory, way.tensor, way.ranks, spread, threshold=way.threshold, **limits) as runner:
        grouped: Any = runner
        blocks = 34 if way.preempt else 128
        with InProcessWorker(
            grouped, num_blocks=blocks, prefix_caching=way.caching, scheduler=settings, banks=way.ranks
        ) as worker:
            rounds = [(prompts, ask(prompts))]
            if way.caching:
                more = follow_ups(prompts, rounds[0][1], model.spec.vocab)
                rounds.append((more, ask(more)))
                assert worker.cached_tokens > 0
            assert (worker.preemptions > 0) == way.preempt
            return rounds


def require_exact(model: Any, way: Way, shared: Seen) -> None:
    copies = 3 if way.preempt and way.ranks == 4 else 1  # four small banks hold the prompts once
    for prompts, outputs in run(model, way, long_prompts(model.spec.vocab, copies)):
        model.require_exact(prompts, [output.tokens for output in outputs])
    chunks = shared.chunks
    assert max(map(len, shared.steps)) > 1 or way.budget < 300
    if way.budget < 300:
        assert any(0 < chunk.held == chunk.start for chunk in chunks)  # go on where a shared one ended
    if way.caching:
        assert any(chunk.held == 0 < chunk.start for chunk in chunks)  # begin behind what the cache has


@pytest.mark.parametrize(
    ("spec", "way"),
    every(4, [(spec, way_of(number, spec, WAYS)) for number, spec in enumerate(SPECS)]),
    ids=lambda value: value.name if isinstance(value, CheckpointSpec) else str(value),
)
def test_every_family(checkpoint: Checkpoints, shared: Seen, spec: CheckpointSpec, way: Way) -> None:
    require_exact(checkpoint(spec), way, shared)


@pytest.mark.slow
@pytest.mark.parametrize("way", EVERY_WAY, ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_every_family_in_every_way(checkpoint: Checkpoints, shared: Seen, spec: CheckpointSpec, way: Way) -> None:
    require_exact(checkpoint(spec), way_of(0, spec, [way]), shared)


@pytest.mark.parametrize(("spec", "way"), [(SPECS[0], WAYS[5]), (SPECS[10], WAYS[0])], ids=str)
def test_logprobs(checkpoint: Checkpoints, shared: Seen, spec: CheckpointSpec, way: Way) -> None:
    model = checkpoint(spec)
    for prompts, outputs in run(model, way, long_prompts(spec.vocab), logprobs=0):
        truth = model.reference.logprobs(prompts, [output.tokens for output in outputs])
        for output, expected in zip(outputs, truth, strict=True):
            chosen = torch.tensor([logprob for logprob, _ in output.logprobs], dtype=torch.float64)
            right = expected.gather(1, torch.tensor(output.tokens)[:, None])[:, 0]
            assert float((chosen - right).abs().max()) < 1e-4
    assert shared.chunks


def test_scored_prompts_stay_with_their_owner(checkpoint: Checkpoints, shared: Seen) -> None:
    model, prompts = checkpoint(SPECS[0]), long_prompts(SPECS[0].vocab)[:3]
    ((_, outputs),) = run(model, dataclasses.replace(WAYS[0], caching=False), prompts, prompt_logprobs=0)
    assert not shared.steps
    model.require_exact(prompts, [output.tokens for output in outputs])


@pytest.mark.parametrize("left_out", ["share", "bring_beginnings"])
def test_what_is_not_exchanged_is_noticed(
    checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch, left_out: str
) -> None:
    monkeypatch.setattr(ContextExchange, left_out, lambda *_: None)
    model, prompts = checkpoint(SPECS[0]), long_prompts(SPECS[0].vocab)
    _, (prompts, outputs) = run(model, WAYS[0], prompts)
    assert model.reference.judge(prompts, [output.tokens for output in outputs]).wrong
