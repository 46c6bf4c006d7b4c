"""Greedy output of whole workers, split and mixed, against transformers, in every way of running them.

Each run also shows that it did what its name says: blocks moved, prompts were cut, sequences gave way, prefixes were
found. Workers are threads of this process; `test_http.py` has them as processes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from fakes.exactness import CheckpointSpec, covering_specs, expert_specs, family_specs, mixed_prompts
from fakes.in_ci import every
from fakes.latent_specs import latent_specs
from fakes.threaded_cluster import Answer, HostedWorker, ThreadedCluster
from fakes.variants import (
    Variant,
    all_variants,
    covering_variants,
    greedy,
    pairwise_variants,
    uncovered_pairs,
)

from penstock.workers.forward_pass import kv_view
from penstock.workers.scheduler.plan import StepPlan

SPECS = covering_specs()
FAMILIES = family_specs() + expert_specs() + latent_specs()
ONE_OF_EACH = family_specs()[::3] + expert_specs()[:3:2] + latent_specs()[1:3]
TOKENS = 48
AGAIN = 24  # prompts that are sent a second time, when their blocks may be cached


@pytest.mark.parametrize(
    ("spec", "variant"), every(6, zip(SPECS, covering_variants(), strict=True)), ids=lambda v: _id(v)
)
def test_every_checkpoint_in_one_variant(
    checkpoint: Callable[[CheckpointSpec], Any], spec: CheckpointSpec, variant: Variant
) -> None:
    require_exact(checkpoint(spec), variant)


@pytest.mark.parametrize("spec", every(12, ONE_OF_EACH), ids=lambda spec: spec.name)
def test_newer_families_split_in_small_chunks_with_preemption(
    checkpoint: Callable[[CheckpointSpec], Any], spec: CheckpointSpec
) -> None:
    require_exact(checkpoint(spec), Variant(split=True, chunk=16, caching=True, preempt=True), count=24)


AHEAD = (
    Variant(split=True, chunk=16, caching=True, preempt=True, ahead=True),
    Variant(split=False, chunk=0, caching=True, preempt=False, ahead=True),
)


@pytest.mark.parametrize(
    ("spec", "variant"), every(2, zip(ONE_OF_EACH[::3], AHEAD, strict=False)), ids=lambda v: _id(v)
)
def test_steps_planned_before_the_last_ones_tokens_are_known(
    checkpoint: Callable[[CheckpointSpec], Any], spec: CheckpointSpec, variant: Variant
) -> None:
    require_exact(checkpoint(spec), variant)


@pytest.mark.slow
@pytest.mark.parametrize("variant", [replace(variant, ahead=True) for variant in all_variants()], ids=str)
@pytest.mark.parametrize("spec", [SPECS[0], ONE_OF_EACH[-1]], ids=lambda spec: spec.name)
def test_the_same_in_every_variant(
    checkpoint: Callable[[CheckpointSpec], Any], spec: CheckpointSpec, variant: Variant
) -> None:
    require_exact(checkpoint(spec), variant)


@pytest.mark.slow
@pytest.mark.parametrize("variant", all_variants(), ids=str)
@pytest.mark.parametrize("spec", SPECS + FAMILIES, ids=lambda spec: spec.name)
def test_every_checkpoint_in_every_variant(
    checkpoint: Callable[[CheckpointSpec], Any], spec: CheckpointSpec, variant: Variant
) -> None:
    require_exact(checkpoint(spec), variant)


def test_the_covers_hold_every_pair() -> None:
    family = [(spec.family, *v.factors) for spec, v in zip(SPECS, covering_variants(), strict=True)]
    assert uncovered_pairs(family) == set()
    assert uncovered_pairs([variant.factors for variant in pairwise_variants()]) == set()
    assert len({variant.factors for variant in all_variants()}) == 24
    assert uncovered_pairs([(1, 2), (1, 3), (2, 2)]) == {(0, 1, 2, 3)}


@pytest.mark.parametrize("spec", [SPECS[0], SPECS[6]], ids=lambda spec: spec.name)
def test_a_block_that_is_altered_on_the_way_is_noticed(
    checkpoint: Callable[[CheckpointSpec], Any], spec: CheckpointSpec
) -> None:
    """The first block that the decode worker got for one prompt holds negated values: the judge must say so."""
    model, variant = checkpoint(spec), Variant(split=True, chunk=64, caching=False, preempt=False)
    altered: list[int] = []

    def alter(hosted: HostedWorker, plan: StepPlan) -> None:
        if hosted.settings.worker_id == "decode-0" and not altered:
            block = int(plan.block_tables[0, 0])
            kv_view(hosted.storage.data, hosted.layout)[block, :, 1].neg_()
            altered.append(block)

    prompts = [prompt for prompt in mixed_prompts(spec.vocab) if len(prompt) > 40][:4]
    answers, _ = asyncio.run(_run(model.directory, variant, prompts, alter))
    assert altered
    assert model.reference.judge(prompts, [answer.tokens for answer in answers]).wrong


def require_exact(model: Any, variant: Variant, count: int = 64) -> None:
    """One cluster, all prompts together, with a cache some of them again; every token is judged."""
    prompts = mixed_prompts(model.spec.vocab, count)
    answers, cluster = asyncio.run(_run(model.directory, variant, prompts))
    _check_what_happened(variant, cluster, prompts, answers)
    asked = prompts + prompts[: len(answers) - len(prompts)]
    model.require_exact(asked, [answer.tokens for answer in answers])


async def _run(
    model_dir: Any, variant: Variant, prompts: list[tuple[int, ...]], on_plan: Any = None
) -> tuple[list[Answer], ThreadedCluster]:
    async with ThreadedCluster(variant.workers(model_dir), variant.router, on_plan) as cluster, asyncio.timeout(90.0):
        answers = await cluster.generate(greedy(prompts, TOKENS))
        if variant.caching:
            answers += await cluster.generate(greedy(prompts[:AGAIN], TOKENS // 3))
    return answers, cluster


def _check_what_happened(
    variant: Variant, cluster: ThreadedCluster, prompts: list[tuple[int, ...]], answers: list[Answer]
) -> None:
    assert {report.terminal for report in cluster.reports} == {"completed"}
    assert all(len(answer.tokens) == TOKENS for answer in answers[: len(prompts)])
    computing = cluster.workers["prefill-0" if variant.split else "mixed-0"]
    decoding = cluster.workers["decode-0" if variant.split else "mixed-0"]
    longest = max(len(prompt) for prompt in prompts)
    # whoever gave way computes its prompt again and with it what it had generated
    again = TOKENS if variant.preempt and not variant.chunk else 0
    assert 0 <= computing.longest_chunk - (variant.chunk or longest) <= again
    assert all(hosted.widest_step <= variant.step_tokens for hosted in cluster.workers.values())
    assert (decoding.preemptions > 0) == variant.preempt
    assert (decoding.planned_ahead > decoding.steps // 2) == variant.ahead
    cached = sum(answer.cached_tokens for answer in answers)
    assert (cached > 0) == variant.caching
    if variant.split:
        arrived = decoding.transfers.incoming_arrived
        assert arrived == computing.transfers.outgoing_done >= len(answers)
        assert decoding.transfers.fragments_landed > 0
        if not variant.preempt:  # only then does a decode worker compute prompts: of those that gave way
            assert decoding.chunk_tokens == 0


def _id(value: object) -> str:
    return value.name if isinstance(value, CheckpointSpec) else str(value)
