"""Clusters brought up by `penstock serve` and asked over HTTP: greedy tokens, logprobs and seeded sampling are exact.

One cluster per row of a pairwise cover; what its workers say of themselves shows that the row did what it is named
after. The first two rows, a split and a mixed cluster that have nothing in common, belong to every run.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from fakes.exactness import CheckpointSpec, covering_specs, family_specs, mixed_prompts
from fakes.foreign_checkpoints import NAMED, ForeignSpec
from fakes.sampled import fields, others
from fakes.served_cluster import Choice, Completion, ServedCluster, complete
from fakes.sharded_specs import sharded_specs
from fakes.variants import Variant, pairwise_variants

SPECS = [covering_specs()[number] for number in (0, 8, 7, 3, 10, 2)]
ROWS = list(zip(SPECS, pairwise_variants(), strict=True))
# Of every newer family and every named foreign architecture one, each in a row of its own
FAMILY_ROWS = list(zip(family_specs()[::3], pairwise_variants()[2:], strict=False))
FOREIGN_ROWS = list(zip(NAMED, pairwise_variants(), strict=False))
GROUP_ROWS = [
    (sharded_specs()[0], Variant(split=True, chunk=16, caching=True, preempt=False), {"": 2}),
    (sharded_specs()[2], Variant(split=False, chunk=64, caching=False, preempt=True), {"": 4}),
    (sharded_specs()[7], Variant(split=True, chunk=64, caching=True, preempt=True), {"prefill-": 1, "decode-": 2}),
]
TOKENS = 48
AGAIN = 24
ALTERNATIVES = 5
STATUS_AGE_S = 1.0  # a heartbeat comes every half second

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]


@pytest.mark.parametrize(
    ("spec", "variant"), [ROWS[0], pytest.param(*ROWS[1], marks=pytest.mark.slow)], ids=lambda value: _id(value)
)
def test_two_opposite_clusters(
    checkpoint: Callable[..., Any], tmp_path: Path, spec: CheckpointSpec, variant: Variant
) -> None:
    check_cluster(checkpoint(spec), variant, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("spec", "variant"), ROWS[2:], ids=lambda value: _id(value))
def test_the_rest_of_the_cover(
    checkpoint: Callable[..., Any], tmp_path: Path, spec: CheckpointSpec, variant: Variant
) -> None:
    check_cluster(checkpoint(spec), variant, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("spec", "variant"), FAMILY_ROWS + FOREIGN_ROWS, ids=lambda value: _id(value))
def test_newer_families_and_foreign_architectures(
    checkpoint: Callable[..., Any], tmp_path: Path, spec: CheckpointSpec | ForeignSpec, variant: Variant
) -> None:
    check_cluster(checkpoint(spec), variant, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("spec", "variant", "widths"), GROUP_ROWS, ids=lambda value: _id(value))
def test_workers_of_several_ranks(
    checkpoint: Callable[..., Any], tmp_path: Path, spec: CheckpointSpec, variant: Variant, widths: Mapping[str, int]
) -> None:
    """By flags, as a user would; each rank an actor of its own."""
    arguments = [word for role, width in widths.items() for word in (f"--{role}tensor-parallel-size", str(width))]
    check_cluster(checkpoint(spec), variant, tmp_path, arguments, widths)


def check_cluster(
    model: Any,
    variant: Variant,
    folder: Path,
    arguments: Sequence[str] = (),
    widths: Mapping[str, int] = MappingProxyType({}),
) -> None:
    """Bring it up, ask everything, and take it down without a rest."""
    cluster = ServedCluster(folder, [str(model.directory), *arguments], variant.configuration())
    try:
        cluster.wait_ready(120.0)
        for worker in cluster.workers().values():
            width = widths.get(f"{worker['role']}-", widths.get("", 1))
            assert (worker["width"], len(set(worker["pids"]))) == (width, width)
        check_greedy(model, variant, cluster)
        check_sampled(model, cluster)
        assert cluster.terminate() == 0
        assert cluster.survivors(10.0) == []
    finally:
        cluster.end()


def check_greedy(model: Any, variant: Variant, cluster: ServedCluster) -> None:
    prompts = mixed_prompts(model.spec.vocab)
    before = cluster.workers()
    found = asyncio.run(complete(cluster.url, [_greedy(n, prompt) for n, prompt in enumerate(prompts)]))
    if variant.caching:
        again = [_greedy(n, prompt) for n, prompt in enumerate(prompts[:AGAIN])]
        found += asyncio.run(complete(cluster.url, again))
    asked = prompts + prompts[: len(found) - len(prompts)]
    choices = [completion.choices[0] for completion in found]
    for prompt, choice in zip(asked, choices, strict=True):
        assert (tuple(choice.prompt), len(choice.tokens), choice.finish_reason) == (prompt, TOKENS, "length")
    model.require_exact(asked, [choice.tokens for choice in choices])
    check_logprobs(model, asked, choices)
    check_what_happened(variant, before, _settled(cluster), asked, found)
    assert {choice.pieces > 1 for choice in choices} == {True, False}  # streamed and not


def check_logprobs(model: Any, prompts: list[tuple[int, ...]], choices: list[Choice]) -> None:
    """Of the prompts that asked for them, within 1e-4 of float64."""
    asked = [number for number, choice in enumerate(choices) if choice.logprobs]
    assert len(asked) >= len(prompts) // 4
    truths = model.reference.logprobs([prompts[n] for n in asked], [choices[n].tokens for n in asked])
    for number, truth in zip(asked, truths, strict=True):
        choice = choices[number]
        assert len(choice.logprobs) == len(choice.top) == TOKENS
        for step, (token, logprob, top) in enumerate(zip(choice.tokens, choice.logprobs, choice.top, strict=True)):
            assert logprob == pytest.approx(float(truth[step, token]), abs=1e-4)
            assert top == pytest.approx({other: float(truth[step, other]) for other in top}, abs=1e-4)
            best = sorted(top.values(), reverse=True)[:ALTERNATIVES]
            assert best == pytest.approx(truth[step].topk(ALTERNATIVES).values.tolist(), abs=1e-4)


def check_what_happened(
    variant: Variant,
    before: dict[str, dict[str, Any]],
    after: dict[str, dict[str, Any]],
    prompts: list[tuple[int, ...]],
    found: list[Completion],
) -> None:
    """The workers' own figures. A prefill worker can only have stepped for prompts whose KV it then sent."""
    assert set(after) == ({"prefill-0", "decode-0"} if variant.split else {"mixed-0"})
    assert {worker["restarts"] for worker in after.values()} == {0}
    computing = "prefill-0" if variant.split else "mixed-0"
    decoding = "decode-0" if variant.split else "mixed-0"
    cached = sum(completion.cached_tokens for completion in found)
    assert (cached > 0) == variant.caching
    assert (after[decoding]["preemptions"] > 0) == variant.preempt
    assert all(worker["kv_free_blocks"] == worker["kv_blocks"] for worker in after.values())
    steps = {name: after[name]["step"] - before[name]["step"] for name in after}
    computed = sum(map(len, prompts)) - cached
    assert steps[computing] * variant.step_tokens >= computed
    if variant.chunk:
        assert steps[computing] >= max(map(len, prompts)) / variant.chunk
    assert steps[decoding] >= TOKENS - 1


def check_sampled(model: Any, cluster: ServedCluster) -> None:
    """Alone, in a crowd, streamed and whole: the tokens of one mixed worker in this process; choices differ."""
    bodies = [{"stream": number % 2 == 0, **body} for number, body in enumerate(fields(model.spec.vocab))]
    alone = [asyncio.run(complete(cluster.url, [body]))[0] for body in bodies]
    crowd = asyncio.run(complete(cluster.url, [*bodies, *others(model.spec.vocab)]))[: len(bodies)]
    assert [one.choices[0].tokens for one in alone] == model.sampled_alone
    assert [one.choices[0].tokens for one in crowd] == model.sampled_alone
    asked = [{**bodies[0], "n": 4, "stream": stream} for stream in (True, False)]
    first, second = (asyncio.run(complete(cluster.url, [body]))[0] for body in asked)
    tokens = [choice.tokens for choice in first.choices]
    assert tokens == [choice.tokens for choice in second.choices]
    assert len({tuple(choice) for choice in tokens}) == 4
    assert tokens[0] == model.sampled_alone[0]


def _greedy(number: int, prompt: tuple[int, ...]) -> dict[str, Any]:
    """Every second is streamed; a quarter, of either kind, asks for logprobs."""
    body = {"prompt": list(prompt), "max_tokens": TOKENS, "temperature": 0, "stream": number % 2 == 0}
    return {**body, "logprobs": ALTERNATIVES} if number % 8 < 2 else body


def _settled(cluster: ServedCluster) -> dict[str, dict[str, Any]]:
    """The workers once they are idle, by heartbeats that are younger than the last answer."""
    time.sleep(STATUS_AGE_S)
    cluster.until(lambda: all(w["running"] + w["waiting"] + w["transfers"] == 0 for w in cluster.workers().values()), 5)
    return cluster.workers()


def _id(value: object) -> str:
    return value.name if isinstance(value, (CheckpointSpec, ForeignSpec)) else str(value)
