"""Seeded sampling over worker processes: the same tokens alone and in a crowd, split and mixed; choices differ."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fakes.exactness import covering_specs
from fakes.in_ci import every
from fakes.sampled import COUNT, as_requests, edited_requests, fields, others
from fakes.variants import Variant

from penstock.cluster.local import LocalCluster
from penstock.workers.protocol import GenerateRequest

SPEC = covering_specs()[6]


@pytest.fixture(scope="module")
def sampled(checkpoint: Callable[..., Any]) -> Callable[[Variant], dict[str, list[list[int]]]]:
    """What one cluster of processes gives for the same requests, in all ways of asking."""
    model, done = checkpoint(SPEC), {}

    def sample(variant: Variant) -> dict[str, list[list[int]]]:
        if variant not in done:
            done[variant] = asyncio.run(_sample(model.directory, variant))
        return done[variant]

    return sample


SPLIT = Variant(split=True, chunk=16, caching=True, preempt=False)
RESUMED_AT = (1, 13, 30)
MIXED = Variant(split=False, chunk=0, caching=False, preempt=True)


AHEAD = Variant(split=True, chunk=16, caching=True, preempt=True, ahead=True)


@pytest.mark.parametrize("variant", every(3, [SPLIT, MIXED, AHEAD]), ids=str)
def test_alone_or_among_32_others_is_the_same(sampled: Any, checkpoint: Callable[..., Any], variant: Variant) -> None:
    """And the same as in one mixed worker inside this process."""
    found = sampled(variant)
    assert found["alone"] == found["crowd"] == checkpoint(SPEC).sampled_alone
    assert all(len(tokens) == COUNT for tokens in found["alone"])
    assert len({tuple(tokens) for tokens in found["alone"]}) == len(found["alone"])


def test_another_seed_gives_another_text(sampled: Any) -> None:
    found = sampled(SPLIT)
    assert all(one != other for one, other in zip(found["alone"], found["reseeded"], strict=True))


@pytest.mark.parametrize("variant", every(2, [SPLIT, MIXED]), ids=str)
def test_choices_of_a_seed_differ_and_repeat(sampled: Any, variant: Variant) -> None:
    found = sampled(variant)
    assert len({tuple(tokens) for tokens in found["choices"]}) == 4
    assert found["choices"] == found["choices again"]
    assert found["choices"][0] == found["alone"][0]


@pytest.mark.slow
def test_split_and_mixed_choose_alike(sampled: Any) -> None:
    assert sampled(SPLIT) == sampled(MIXED)


@pytest.mark.parametrize("variant", every(2, [SPLIT, MIXED]), ids=str)
def test_edited_logits_give_the_same_alone_among_32_and_resumed(sampled: Any, variant: Variant) -> None:
    """Penalties, biases, bad words, allowed tokens, min_tokens, seeded; resumed is as after the death of a worker."""
    found = sampled(variant)
    assert found["edited alone"] == found["edited crowd"]
    for point in RESUMED_AT:
        resumed = found[f"edited resumed at {point}"]
        assert resumed == [tokens[point:] for tokens in found["edited alone"] if len(tokens) > point]
        assert resumed


async def _sample(model_dir: Path, variant: Variant) -> dict[str, list[list[int]]]:
    bodies = fields(SPEC.vocab)
    async with LocalCluster(variant.workers(model_dir), variant.router) as cluster, asyncio.timeout(90.0):

        async def ask(requests: list[GenerateRequest]) -> list[list[int]]:
            return list(await asyncio.gather(*(_tokens(cluster, request) for request in requests)))

        choices = [as_requests(bodies[:1], choice)[0] for choice in range(4)]
        found = {
            "alone": [(await ask([request]))[0] for request in as_requests(bodies)],
            "crowd": (await ask(as_requests(bodies + others(SPEC.vocab))))[: len(bodies)],
            "reseeded": await ask(as_requests([{**body, "seed": (body["seed"] + 100) % 2**64} for body in bodies])),
            "choices": await ask(choices),
            "choices again": await ask(choices[::-1]),
        }
        edited = edited_requests(SPEC.vocab)
        alone = found["edited alone"] = [(await ask([request]))[0] for request in edited]
        found["edited crowd"] = (await ask([*edited, *as_requests(others(SPEC.vocab))]))[: len(edited)]
        for point in RESUMED_AT:
            pairs = [(request, tokens) for request, tokens in zip(edited, alone, strict=True) if len(tokens) > point]
            found[f"edited resumed at {point}"] = await ask(
                [dataclasses.replace(request, emitted=tuple(tokens[:point])) for request, tokens in pairs]
            )
        found["choices again"].reverse()
    return found


async def _tokens(cluster: LocalCluster, request: GenerateRequest) -> list[int]:
    return [token async for delta in cluster.generator.submit(request) for token in delta.tokens]
