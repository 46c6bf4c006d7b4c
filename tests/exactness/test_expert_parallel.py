"""Models whose experts and sequences are spread over ranks, against transformers, in every split of T x E ranks.

Ranks are threads that meet over the loopback interface, behind the real scheduler with a bank of blocks and a prefix
cache for every copy of the attention.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fakes.exactness import CheckpointSpec, mixed_prompts
from fakes.expert_rank_threads import SpreadRunner
from fakes.in_ci import every
from fakes.in_process import InProcessWorker
from fakes.sampled import as_requests, edited_requests, fields
from fakes.sharded_specs import sharded_specs

from penstock.workers.errors import ConfigError
from penstock.workers.expert_ranks import ExpertSpread
from penstock.workers.protocol import GenerateRequest, SamplingParams
from penstock.workers.settings import SchedulerSettings

SPECS = [
    spec for spec in sharded_specs() if "moe" in spec.family or spec.family in ("mixtral", "deepseek-v2", "deepseek-v3")
]
SPLITS = [(1, 1), (2, 1), (1, 2), (2, 2), (1, 4)]  # tensor x expert ranks
MAX_MODEL_LEN, TOKENS = 256, 24
Checkpoints = Callable[[CheckpointSpec], Any]


@dataclasses.dataclass(frozen=True)
class Way:
    """How a model is run."""

    split: tuple[int, int]
    chunk: int  # prompt tokens per step; 0 = all
    caching: bool
    preempt: bool
    redundant: int = 0

    def __str__(self) -> str:
        words = ["x".join(map(str, self.split)), f"chunk{self.chunk or '-none'}"]
        return "-".join(words + ["cache"] * self.caching + ["preempt"] * self.preempt + ["copies"] * self.redundant)


COVER = [
    Way((1, 2), 16, caching=True, preempt=False),
    Way((2, 2), 0, caching=False, preempt=True),
    Way((1, 4), 64, caching=True, preempt=True, redundant=2),
    Way((1, 2), 0, caching=False, preempt=True, redundant=1),
    Way((2, 2), 64, caching=True, preempt=False),
]
PRODUCT = [
    Way(*row)
    for row in itertools.product(SPLITS, (16, 64, 0), (True, False), (True, False))
    if row[0] not in ((1, 1), (2, 1))
]


def hosted(runner: SpreadRunner, way: Way) -> InProcessWorker:
    settings = SchedulerSettings(
        max_model_len=MAX_MODEL_LEN,
        # As many sequences for every bank as one rank alone would have, so that each runs out of blocks.
        max_num_batched_tokens=way.chunk * way.split[1] or 8192,
        long_prefill_token_threshold=way.chunk,
        max_num_seqs=min(way.chunk * way.split[1] or 64, 64),
        reserve_tokens=0 if way.preempt else MAX_MODEL_LEN,
        watermark=0.0 if way.preempt else 0.01,
    )
    grouped: Any = runner  # stands for all ranks' runners
    blocks = 18 if way.preempt else 256
    return InProcessWorker(
        grouped, num_blocks=blocks, prefix_caching=way.caching, scheduler=settings, banks=way.split[1]
    )


def require_exact(model: Any, way: Way, count: int) -> None:
    prompts = mixed_prompts(model.spec.vocab, count)
    spread = ExpertSpread(redundant=way.redundant, rebalance_steps=8)
    with SpreadRunner(model.directory, *way.split, spread, max_model_len=MAX_MODEL_LEN) as runner:
        with hosted(runner, way) as worker:
            outputs = [output.tokens for output in worker.greedy(prompts, TOKENS)]
            if way.preempt:
                assert worker.preemptions > 0
            if way.caching:
                assert [output.tokens for output in worker.greedy(prompts, TOKENS)] == outputs
                assert worker.cached_tokens > 0
        model.require_exact(prompts, outputs)


@pytest.mark.parametrize(("spec", "way"), every(2, zip(SPECS, COVER, strict=True)), ids=lambda v: _id(v))
def test_every_family_in_one_way(checkpoint: Checkpoints, spec: CheckpointSpec, way: Way) -> None:
    require_exact(checkpoint(spec), way, count=20)


@pytest.mark.slow
@pytest.mark.parametrize("way", PRODUCT, ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: _id(spec))
def test_every_family_in_every_way(checkpoint: Checkpoints, spec: CheckpointSpec, way: Way) -> None:
    require_exact(checkpoint(spec), way, count=40)


def test_drawn_tokens_and_logprobs_are_those_of_one_rank(checkpoint: Checkpoints) -> None:
    model = checkpoint(SPECS[0])
    requests = as_requests(fields(SPECS[0].vocab)) + edited_requests(SPECS[0].vocab)
    asked = SamplingParams(max_tokens=6, logprobs=2, prompt_logprobs=0)
    requests += [
        GenerateRequest(f"p{n}", prompt, asked, cache_prefix=False)
        for n, prompt in enumerate(mixed_prompts(SPECS[0].vocab, 4, longest=40))
    ]
    drawn, scores = [], []
    for split in ((1, 1), (1, 2)):
        way = Way(split, 64, caching=False, preempt=False)
        with (
            SpreadRunner(model.directory, *split, ExpertSpread(), max_model_len=MAX_MODEL_LEN) as runner,
            hosted(runner, way) as worker,
        ):
            outputs = worker.generate(requests)
            drawn.append([output.tokens for output in outputs])
            scores.append(
                [score.logprob for o in outputs if o.scores for score in o.scores.read() if score is not None]
            )
    assert drawn[1] == drawn[0]
    assert len(scores[0]) > 20
    assert float((torch.tensor(scores[1]) - torch.tensor(scores[0])).abs().max()) < 1e-4


def test_a_dense_model_and_too_many_ranks_are_refused(checkpoint: Checkpoints) -> None:
    dense, few = checkpoint(sharded_specs()[0]), checkpoint(next(spec for spec in SPECS if spec.family == "mixtral"))
    with pytest.raises(ConfigError, match="the model has no experts"):
        SpreadRunner(dense.directory, 1, 2, ExpertSpread(), max_model_len=MAX_MODEL_LEN)
    with pytest.raises(ConfigError, match="is above the model's"):
        SpreadRunner(few.directory, 1, 9, ExpertSpread(), max_model_len=MAX_MODEL_LEN)


def _id(value: object) -> str:
    return value.name if isinstance(value, CheckpointSpec) else str(value)
