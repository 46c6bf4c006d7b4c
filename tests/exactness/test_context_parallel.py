"""Long prompts that several ranks compute together, against transformers: every family, chunk by chunk or at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from fakes.exactness import CheckpointSpec
from fakes.expert_rank_threads import SpreadRunner
from fakes.in_process import InProcessWorker
from fakes.sharded_specs import sharded_specs

from penstock.workers.expert_ranks import ExpertSpread
from penstock.workers.parallel import context_parallel
from penstock.workers.protocol import GenerateRequest, SamplingParams, Tokens
from penstock.workers.settings import SchedulerSettings

SPECS = sharded_specs()
MAX_MODEL_LEN, TOKENS = 512, 8
Checkpoints = Callable[[CheckpointSpec], Any]


@dataclass(frozen=True)
class Way:
    """How prompts are computed."""

    tensor: int
    ranks: int
    budget: int  # tokens of a step
    threshold: int
    spread: bool = False  # experts lie on one rank each

    def __str__(self) -> str:
        return f"{self.tensor}x{self.ranks}-budget{self.budget}-from{self.threshold}" + "-spread" * self.spread


WAYS = [
    Way(1, 2, 512, 48),
    Way(1, 3, 96, 40),
    Way(1, 4, 512, 64),
    Way(2, 2, 128, 32),
]


def way_of(number: int, spec: CheckpointSpec) -> Way:
    way = WAYS[number % len(WAYS)]
    return Way(way.tensor, way.ranks, way.budget, way.threshold, spread=spec.family in ("qwen3-moe", "deepseek-v3"))


def long_prompts(vocab: int) -> list[Tokens]:
    """Lengths on and off the borders of blocks, pieces and chunks; some begin alike."""
    lengths = [300, 31, 257, 96, 8, 191, 48, 300, 130]
    return [tuple((7 * i * i + 3 * i + n % 3) % (vocab - 3) for i in range(length)) for n, length in enumerate(lengths)]


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Positions from which shared chunks began, as every rank saw them."""
    seen: list[int] = []
    inner = context_parallel.ContextExchange.__init__

    def note(self: Any, group: Any, chunk: Any, *rest: Any) -> None:
        seen.append(chunk.start)
        inner(self, group, chunk, *rest)

    monkeypatch.setattr(context_parallel.ContextExchange, "__init__", note)
    return seen


def run(model: Any, way: Way, prompts: list[Tokens], caching: bool, **sampling: Any) -> Any:
    spread = ExpertSpread(rebalance_steps=0) if way.spread else None
    settings = SchedulerSettings(max_model_len=MAX_MODEL_LEN, max_num_batched_tokens=way.budget, max_num_seqs=16)
    requests = [
        GenerateRequest(f"r{n}", prompt, SamplingParams(max_tokens=TOKENS, **sampling))
        for n, prompt in enumerate(prompts)
    ]
    with SpreadRunner(
        model.directory, way.tensor, way.ranks, spread, threshold=way.threshold, max_model_len=MAX_MODEL_LEN
    ) as runner:
        grouped: Any = runner
        with InProcessWorker(
            grouped, num_blocks=128, prefix_caching=caching, scheduler=settings, banks=way.ranks
        ) as worker:
            first = worker.generate(requests)
            if caching:
                again = worker.generate(requests)
                assert [output.tokens for output in again] == [output.tokens for output in first]
                assert worker.cached_tokens > 0
            return first


@pytest.mark.parametrize(
    ("spec", "way"),
    [(spec, way_of(number, spec)) for number, spec in enumerate(SPECS)],
    ids=lambda value: value.name if isinstance(value, CheckpointSpec) else str(value),
)
def test_every_family(checkpoint: Checkpoints, shared: list[int], spec: CheckpointSpec, way: Way) -> None:
    model, prompts = checkpoint(spec), long_prompts(spec.vocab)
    outputs = run(model, way, prompts, caching=True)
    assert len(shared) >= way.ranks
    if way.budget < 300:
        assert max(shared) > 0  # chunks that go on where a shared one ended
    model.require_exact(prompts, [output.tokens for output in outputs])


def test_scored_prompts_stay_with_their_owner(checkpoint: Checkpoints, shared: list[int]) -> None:
    model, prompts = checkpoint(SPECS[0]), long_prompts(SPECS[0].vocab)[:3]
    outputs = run(model, WAYS[0], prompts, caching=False, prompt_logprobs=0)
    assert not shared
    model.require_exact(prompts, [output.tokens for output in outputs])


def test_what_is_not_exchanged_is_noticed(checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(context_parallel.ContextExchange, "share", lambda *_: None)
    model, prompts = checkpoint(SPECS[0]), long_prompts(SPECS[0].vocab)
    outputs = run(model, WAYS[0], prompts, caching=False)
    assert model.reference.judge(prompts, [output.tokens for output in outputs]).wrong
