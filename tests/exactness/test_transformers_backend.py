"""Greedy output of architectures that run as transformers' own modules over our paged attention, split and mixed.

Prompts are cut into chunks of 16 beside decodes, prefixes come from the cache, and blocks are so few that sequences
give way; every token is judged by transformers in float64. The slow run has every architecture of the list.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
from fakes.exactness import mixed_prompts
from fakes.foreign_checkpoints import MORE, NAMED, ForeignReference, ForeignSpec, make_foreign
from fakes.in_ci import every
from fakes.threaded_cluster import Answer, HostedWorker, ThreadedCluster
from fakes.variants import Variant, all_variants, greedy

from penstock.workers.forward_pass import kv_view
from penstock.workers.scheduler.plan import StepPlan

TOKENS = 24
PROMPTS = 24
AGAIN = 8  # prompts that are sent a second time, when their blocks may be cached
OFTEN = [*NAMED, *MORE[:2]]  # Gemma 2: soft caps and windows; DeepSeek V3: latent attention and experts


@dataclasses.dataclass
class Foreign:
    spec: ForeignSpec
    directory: Path

    @functools.cached_property
    def reference(self) -> ForeignReference:
        return ForeignReference(self.directory)


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Callable[[ForeignSpec], Foreign]:
    @functools.cache
    def make(spec: ForeignSpec) -> Foreign:
        return Foreign(spec, make_foreign(tmp_path_factory.mktemp("foreign") / spec.name, spec))

    return make


def _id(value: ForeignSpec | bool) -> str:
    if isinstance(value, ForeignSpec):
        return value.name
    return "split" if value else "mixed"


@pytest.mark.parametrize(("spec", "split"), every(5, product(OFTEN, (True, False))), ids=lambda value: _id(value))
def test_greedy_output_is_that_of_transformers(
    foreign: Callable[[ForeignSpec], Foreign], spec: ForeignSpec, split: bool
) -> None:
    require_exact(foreign(spec), Variant(split, 16, True, True))


@pytest.mark.slow
@pytest.mark.parametrize("split", [True, False], ids=["split", "mixed"])
@pytest.mark.parametrize("spec", MORE[2:], ids=lambda spec: spec.name)
def test_greedy_output_of_every_other(
    foreign: Callable[[ForeignSpec], Foreign], spec: ForeignSpec, split: bool
) -> None:
    require_exact(foreign(spec), Variant(split, 16, True, True))


@pytest.mark.slow
@pytest.mark.parametrize("variant", all_variants(), ids=str)
@pytest.mark.parametrize("spec", NAMED, ids=lambda spec: spec.name)
def test_the_named_in_every_variant(
    foreign: Callable[[ForeignSpec], Foreign], spec: ForeignSpec, variant: Variant
) -> None:
    require_exact(foreign(spec), variant)


@pytest.mark.parametrize("spec", [NAMED[0], NAMED[2]], ids=lambda spec: spec.name)
def test_the_same_as_generate(foreign: Callable[[ForeignSpec], Foreign], spec: ForeignSpec) -> None:
    """What the judge says step by step, asked of `transformers.generate` directly."""
    model = foreign(spec)
    prompts = [prompt for prompt in mixed_prompts(spec.vocab, PROMPTS) if len(prompt) > 20][:3]
    answers, _ = asyncio.run(_run(model.directory, Variant(True, 16, False, False), prompts))
    assert [answer.tokens for answer in answers] == [model.reference.generate(prompt, TOKENS) for prompt in prompts]


def test_an_altered_block_is_noticed(foreign: Callable[[ForeignSpec], Foreign]) -> None:
    model, altered = foreign(NAMED[1]), []

    def alter(hosted: HostedWorker, plan: StepPlan) -> None:
        if hosted.settings.worker_id == "decode-0" and not altered:
            altered.append(int(plan.block_tables[0, 0]))
            kv_view(hosted.storage.data, hosted.layout)[altered[0], :, 1].neg_()

    prompts = [prompt for prompt in mixed_prompts(model.spec.vocab) if len(prompt) > 40][:2]
    answers, _ = asyncio.run(_run(model.directory, Variant(True, 64, False, False), prompts, alter))
    assert altered
    assert model.reference.judge(prompts, [answer.tokens for answer in answers]).wrong


def require_exact(model: Foreign, variant: Variant) -> None:
    prompts = mixed_prompts(model.spec.vocab, PROMPTS)
    answers, cluster = asyncio.run(_run(model.directory, variant, prompts))
    decoding = cluster.workers["decode-0" if variant.split else "mixed-0"]
    computing = cluster.workers["prefill-0" if variant.split else "mixed-0"]
    # whoever gave way computes its prompt again and with it what it had generated
    again = TOKENS if variant.preempt and not variant.chunk else 0
    assert 0 <= computing.longest_chunk - (variant.chunk or max(map(len, prompts))) <= again
    assert (decoding.preemptions > 0) == variant.preempt
    assert (sum(answer.cached_tokens for answer in answers) > 0) == variant.caching
    assert decoding.transfers.incoming_arrived == (len(answers) if variant.split else 0)
    outputs = [answer.tokens for answer in answers]
    verdict = model.reference.judge([*prompts, *prompts[: len(answers) - PROMPTS]], outputs)
    assert verdict.steps == sum(map(len, outputs)) >= PROMPTS * TOKENS
    verdict.require_exact(tie_share=0.01)
    seen = [len(set(tokens)) / TOKENS for tokens in outputs[:PROMPTS]]
    assert sum(seen) / PROMPTS > 0.3, "the model repeats itself: this comparison would prove little"


async def _run(
    model_dir: Path,
    variant: Variant,
    prompts: list[tuple[int, ...]],
    on_plan: Callable[[HostedWorker, StepPlan], None] | None = None,
) -> tuple[list[Answer], ThreadedCluster]:
    workers = [
        dataclasses.replace(worker, runner=dataclasses.replace(worker.runner, model_impl="transformers"))
        for worker in variant.workers(model_dir)
    ]
    async with ThreadedCluster(workers, variant.router, on_plan) as cluster, asyncio.timeout(60.0):
        answers = await cluster.generate(greedy(prompts, TOKENS))
        if variant.caching:
            answers += await cluster.generate(greedy(prompts[:AGAIN], TOKENS // 2))
    return answers, cluster
