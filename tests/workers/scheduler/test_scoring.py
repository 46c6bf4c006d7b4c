"""Which prompt tokens a step scores: each once, in whatever chunks; not for reservations, not after a preemption."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from fakes.scheduler_stand import Stand, make_request, make_stand

from penstock.workers.errors import IntegrityError
from penstock.workers.protocol import GenerateRequest, SamplingParams
from penstock.workers.scheduler.plan import SampledLogprobs, StepPlan, StepResult
from penstock.workers.scheduler.scheduler import Work


def asking(prompt: list[int], alternatives: int | None = 2, max_tokens: int = 3, **fields: object) -> GenerateRequest:
    sampling = SamplingParams(max_tokens, prompt_logprobs=alternatives)
    return dataclasses.replace(make_request(prompt, sampling=sampling), **fields)  # type: ignore[arg-type]


class Scoring:
    """The stand's runner, which also scores: logprob -target, embedding (last token, position)."""

    def __init__(self, stand: Stand) -> None:
        self.inner = stand.runner
        self.plans: list[StepPlan] = []
        stand.runner = self  # type: ignore[assignment]

    def run(self, plan: StepPlan) -> StepResult:
        self.plans.append(plan)
        result, scored = self.inner.run(plan), plan.scored
        if scored is not None:
            count = len(scored.targets)
            scores = SampledLogprobs(
                -scored.targets.astype(np.float32),
                np.zeros(count, np.int32),
                np.zeros((count, 2), np.int32),
                np.zeros((count, 2), np.float32),
            )
            result = dataclasses.replace(result, scored=scores)
        last = plan.offsets[plan.sample_rows[plan.embed_rows] + 1] - 1
        vectors = np.stack([plan.token_ids[last], plan.sampling.position[plan.embed_rows]], axis=1).astype(np.float32)
        return dataclasses.replace(result, embeddings=vectors if len(vectors) else None)


def scores_of(stand: Stand, slot: int) -> list[tuple[int, float]]:
    found = []
    for outcome in stand.outcomes:
        for chunk in outcome.scored:
            if chunk.key.slot == slot:
                found += [(chunk.start + i, value) for i, value in enumerate(chunk.scores.chosen.tolist())]
    return found


@pytest.mark.parametrize("chunk", [0, 1, 3, 5])
def test_every_prompt_token_is_scored_once_by_the_logits_before_it(chunk: int) -> None:
    stand = make_stand(long_prefill_token_threshold=chunk)
    runner = Scoring(stand)
    prompts = {slot: [slot * 20 + i for i in range(length)] for slot, length in enumerate((1, 2, 9, 14))}
    for slot, prompt in prompts.items():
        stand.submit(slot, Work.GENERATE, asking(prompt, None if slot == 1 else slot))
    stand.run()
    for slot, prompt in prompts.items():
        wanted = [] if slot == 1 else [(i, -float(prompt[i])) for i in range(1, len(prompt))]
        assert scores_of(stand, slot) == wanted
        assert len(stand.tokens[slot]) == 3
    for plan in runner.plans:
        if plan.scored is None:
            continue
        for row, target, alternatives in zip(
            plan.scored.token_rows, plan.scored.targets, plan.scored.alternatives, strict=True
        ):
            before = int(plan.token_ids[row])
            assert target == before + 1
            assert alternatives == before // 20


def test_scores_come_with_the_first_token_at_the_latest() -> None:
    stand = make_stand(long_prefill_token_threshold=4)
    Scoring(stand)
    stand.submit(0, Work.GENERATE, asking(list(range(11))))
    stand.run()
    scored_at = [number for number, outcome in enumerate(stand.outcomes) if outcome.scored]
    first_token_at = next(number for number, outcome in enumerate(stand.outcomes) if len(outcome.tokens))
    assert scored_at == [0, 1, 2]
    assert first_token_at == 2


def test_a_cancelled_one_is_left_out_and_its_neighbour_keeps_its_scores() -> None:
    stand = make_stand()
    runner = Scoring(stand)
    gone = stand.submit(0, Work.GENERATE, asking([1, 2, 3], embed=True))
    stand.submit(1, Work.GENERATE, asking([5, 6, 7, 8], embed=True))
    plan = stand.scheduler.plan(0.0)
    assert plan is not None
    stand.scheduler.cancel(gone, 0.0)
    outcome = stand.scheduler.commit(plan, runner.run(plan), 0.0)
    assert [(chunk.key.slot, chunk.scores.chosen.tolist()) for chunk in outcome.scored] == [(1, [-6.0, -7.0, -8.0])]
    assert [(key.slot, values.tolist()) for key, values in outcome.embedded] == [(1, [8.0, 4.0])]


def test_what_is_scored_is_not_read_from_the_cache_until_it_is() -> None:
    stand = make_stand(num_blocks=12, max_num_seqs=2, long_prefill_token_threshold=4)
    runner = Scoring(stand)
    prompt = list(range(20))
    stand.submit(0, Work.GENERATE, make_request(prompt, 2))
    stand.run()
    computed = len(runner.plans)
    stand.submit(1, Work.GENERATE, asking(prompt))
    stand.run()
    assert sum(plan.num_tokens for plan in runner.plans[computed:]) >= len(prompt)
    assert len(scores_of(stand, 1)) == len(prompt) - 1
    computed = len(runner.plans)
    stand.submit(2, Work.GENERATE, asking(prompt, None))
    stand.run()
    assert sum(plan.num_tokens for plan in runner.plans[computed:]) < len(prompt)


def test_a_reservation_is_not_scored_even_after_a_preemption() -> None:
    stand = make_stand()
    Scoring(stand)
    key = stand.submit(0, Work.RESERVE, asking(list(range(9))))
    assert stand.step() is None
    sequence = stand.scheduler._roster.find(key)
    assert sequence is not None
    assert sequence.unscored == 0


def test_after_a_preemption_only_what_is_missing_is_scored() -> None:
    stand = make_stand(num_blocks=9, reserve_tokens=0, long_prefill_token_threshold=4, max_num_seqs=4)
    Scoring(stand)
    for slot in range(3):
        stand.submit(slot, Work.GENERATE, asking([slot * 20 + i for i in range(10)], max_tokens=9))
    stand.run()
    assert stand.scheduler.stats().preemptions > 0
    for slot in range(3):
        assert scores_of(stand, slot) == [(i, -float(slot * 20 + i)) for i in range(1, 10)]


def test_only_the_prompt_is_embedded() -> None:
    stand = make_stand(long_prefill_token_threshold=4)
    Scoring(stand)
    stand.submit(0, Work.GENERATE, asking([4, 5, 6, 7, 8, 9], None, max_tokens=5, embed=True))
    stand.submit(1, Work.GENERATE, asking([4, 5], None, max_tokens=5, embed=True, emitted=(6, 7)))
    stand.run()
    found = [(key.slot, values.tolist()) for outcome in stand.outcomes for key, values in outcome.embedded]
    assert found == [(0, [9.0, 6.0])]


@pytest.mark.parametrize("spoil", [{"scored": None}, {"embeddings": None}])
def test_a_result_without_what_was_asked_is_refused(spoil: dict[str, None]) -> None:
    stand = make_stand()
    runner = Scoring(stand)
    stand.submit(0, Work.GENERATE, asking([1, 2, 3], embed=True))
    plan = stand.scheduler.plan(0.0)
    assert plan is not None
    with pytest.raises(IntegrityError, match="step did not"):
        stand.scheduler.commit(plan, dataclasses.replace(runner.run(plan), **spoil), 0.0)


def test_a_stop_token_ends_nothing_before_min_tokens() -> None:
    plain = make_stand()
    plain.submit(0, Work.GENERATE, make_request([1, 2, 3], 8))
    plain.run()
    first, second = plain.tokens[0][:2]
    for wanted, count in ((0, 1), (1, 2), (2, 8)):
        stand = make_stand()
        sampling = SamplingParams(8, stop_token_ids=(first, second), min_tokens=wanted)
        stand.submit(0, Work.GENERATE, make_request([1, 2, 3], sampling=sampling))
        stand.run()
        expected = next((i + 1 for i, t in enumerate(plain.tokens[0]) if t in (first, second) and i >= wanted), 8)
        assert len(stand.tokens[0]) == expected
        assert count == expected or wanted == 2
