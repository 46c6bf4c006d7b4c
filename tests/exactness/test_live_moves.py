"""Sequences that go on at other workers again and again while they run, against transformers: no token shows it.

A real checkpoint in float32, whole workers in this process; groups of ranks are processes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from fakes.exactness import CheckpointSpec, covering_specs, mixed_prompts
from fakes.fault_plan import ALWAYS, Action, Fault, FaultPlan, armed
from fakes.grammars import ENDS, SPECS
from fakes.in_ci import every
from fakes.roaming import while_roaming
from fakes.sampled import as_requests, edited_requests, fields
from fakes.threaded_cluster import Answer, ThreadedCluster
from fakes.variants import Variant, greedy, request

from penstock.cluster.model_directory import EMBEDDED_MODEL
from penstock.workers.fault_points import Point
from penstock.workers.protocol import GenerateRequest, SamplingParams
from penstock.workers.settings import WorkerSettings

TOKENS = 48
ROUNDS = 5
SPEC = covering_specs()[0]


def workers(variant: Variant, model_dir: Any, count: int = 3) -> list[WorkerSettings]:
    """As the variant has them, but several of those that decode."""
    *prefills, decode = variant.workers(model_dir)
    return [*prefills, *(replace(decode, worker_id=f"{decode.role.value}-{n}") for n in range(count))]


def every_kind(vocab: int, caching: bool) -> list[GenerateRequest]:
    """Greedy with logprobs first; drawn, edited and stopped ones; four choices of one prompt; scored prompts."""
    bodies = fields(vocab)
    prompts = mixed_prompts(vocab, 12)
    asked = greedy(prompts, TOKENS, logprobs=3)
    asked += as_requests(bodies)
    asked += edited_requests(vocab)
    asked += [as_requests(bodies[:1], choice)[0] for choice in range(1, 4)]
    scored = SamplingParams(TOKENS, logprobs=1, prompt_logprobs=2)
    asked += [request(f"p{n}", prompt, scored) for n, prompt in enumerate(prompts[8:11])]
    return [replace(each, cache_prefix=caching) for each in asked]


def same(moved: Answer, still: Answer) -> bool:
    """Tokens, logprobs and scores of the prompt; probabilities but for the order in which float32 was added up."""
    if moved.tokens != still.tokens or len(moved.logprobs) != len(still.logprobs):
        return False
    pairs = [*zip(moved.logprobs, still.logprobs, strict=True)]
    pairs += [*zip(moved.prompt_logprobs, still.prompt_logprobs, strict=True)]
    return all(
        (one is None) == (other is None)
        and (one is None or other is None or one.logprob == pytest.approx(other.logprob, abs=1e-4))
        for one, other in pairs
    )


async def roam(cluster: ThreadedCluster, asked: Sequence[GenerateRequest]) -> list[Answer]:
    """The answers of requests that move all the time, none of whose tokens was computed twice.

    Asked again until there were moves enough: short answers on a busy machine end before they have moved often.
    """
    before = len(cluster.reports)
    rounds: list[list[Answer]] = []
    moves: list[int] = []
    while len(rounds) < ROUNDS and not (sum(moves) > len(asked) and max(moves) > 2):
        again = [replace(each, request_id=f"m{len(rounds)}-{each.request_id}") for each in asked]
        rounds.append(await while_roaming(cluster.generator.router, cluster.generate(again)))
        moves = [report.live_moves for report in cluster.reports[before:]]
    print(f"{sum(moves)} moves of {len(moves)} streams, at most {max(moves)} of one")
    assert sum(moves) > len(asked)
    assert max(moves) > 2
    assert sum(report.recomputed_tokens + report.migrations for report in cluster.reports[before:]) == 0
    assert all([answer.tokens for answer in each] == [answer.tokens for answer in rounds[0]] for each in rounds)
    return rounds[-1]


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    "variant",
    every(
        3,
        [
            Variant(split=True, chunk=16, caching=False, preempt=False, transport="shared_memory", ahead=True),
            Variant(split=False, chunk=64, caching=True, preempt=False, transport="tcp", ahead=True),
            Variant(split=True, chunk=64, caching=True, preempt=False, transport="tcp"),
        ],
    ),
    ids=str,
)
def test_every_kind_of_request_that_roams(variant: Variant, checkpoint: Callable[[CheckpointSpec], Any]) -> None:
    model = checkpoint(SPEC)
    asked = every_kind(model.spec.vocab, variant.caching)

    async def scenario() -> tuple[list[Answer], list[Answer], int]:
        async with ThreadedCluster(workers(variant, model.directory), variant.router) as cluster:
            still = await cluster.generate(asked)
            moved = await roam(cluster, asked)
        return still, moved, sum(hosted.planned_ahead for hosted in cluster.workers.values())

    still, moved, ahead = asyncio.run(asyncio.wait_for(scenario(), 100.0))
    greedy_ones = [n for n, each in enumerate(asked) if each.request_id.startswith(("g", "p"))]
    model.require_exact([asked[n].prompt for n in greedy_ones], [moved[n].tokens for n in greedy_ones])
    assert [n for n, (one, other) in enumerate(zip(moved, still, strict=True)) if not same(one, other)] == []
    truth = model.reference.logprobs([asked[n].prompt for n in greedy_ones], [moved[n].tokens for n in greedy_ones])
    for n, rows in zip(greedy_ones, truth, strict=True):
        wanted = [float(row[token]) for row, token in zip(rows, moved[n].tokens, strict=True)]
        assert [each.logprob for each in moved[n].logprobs] == pytest.approx(wanted, abs=1e-3)
    assert (ahead > 0) == variant.ahead


@pytest.mark.timeout(120)
def test_texts_under_grammars_that_roam() -> None:
    """Drawn and greedy: the destination follows the grammar from the tokens that came with the KV."""
    variant = Variant(split=True, chunk=64, caching=True, preempt=False)
    prompts = [tuple(range(20 + n, 60 + n)) for n in range(2)]
    asked = [
        request(
            f"{number}.{index}.{heat}", prompt, SamplingParams(TOKENS, heat, seed=5, stop_token_ids=ENDS, grammar=spec)
        )
        for number, prompt in enumerate(prompts)
        for index, spec in enumerate(SPECS)
        for heat in (0.0, 1.1)
    ]

    async def scenario() -> tuple[list[Answer], list[Answer]]:
        async with ThreadedCluster(workers(variant, EMBEDDED_MODEL), variant.router) as cluster:
            still = await cluster.generate(asked)
            return still, await roam(cluster, asked)

    still, moved = asyncio.run(asyncio.wait_for(scenario(), 100.0))
    assert [answer.tokens for answer in moved] == [answer.tokens for answer in still]


@pytest.mark.timeout(120)
def test_blocks_that_arrive_damaged_are_not_decoded_from(checkpoint: Callable[[CheckpointSpec], Any]) -> None:
    """Over TCP, where every block has a digest: the sequence stays, and moves another time."""
    model = checkpoint(SPEC)
    variant = Variant(split=False, chunk=64, caching=False, preempt=False, transport="tcp")
    asked = [replace(each, cache_prefix=False) for each in greedy(mixed_prompts(model.spec.vocab, 12), TOKENS)]
    plan = FaultPlan((Fault(Point.TRANSFER_LAND, Action.CORRUPT, chance=0.2, times=ALWAYS, byte=None),), 3)

    async def scenario() -> tuple[list[Answer], int, int]:
        async with ThreadedCluster(workers(variant, model.directory), variant.router) as cluster:
            found = await while_roaming(cluster.generator.router, cluster.generate(asked))
        reports = cluster.reports
        return found, sum(report.live_moves for report in reports), sum(report.migrations for report in reports)

    with armed(plan):
        found, moves, failed = asyncio.run(asyncio.wait_for(scenario(), 100.0))
    print(f"{moves} moves, {sum(plan.fired().values())} damaged blocks, {failed} attempts failed")
    model.require_exact([each.prompt for each in asked], [answer.tokens for answer in found])
    assert moves > 0
    assert sum(plan.fired().values()) > 0
    assert failed == 0
