"""Requests under a grammar wait for it in the queue, hold nobody up, and end typed where it ends."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest
from fakes.scheduler_stand import Stand, make_request, make_stand

from penstock.workers.errors import GrammarError
from penstock.workers.grammar_spec import GrammarKind, GrammarSpec
from penstock.workers.protocol import FailureCode, GenerateRequest, SamplingParams, Tokens
from penstock.workers.scheduler.events import PreemptedEvent, QueuedEvent, RefusedEvent, SequenceKey, Work
from penstock.workers.scheduler.grammars import Guide
from penstock.workers.scheduler.plan import StepPlan


class CountingGuide:
    """Its mask tells how many tokens it has seen; after `most` it can go no further."""

    def __init__(self, seen: int, most: int) -> None:
        self.mask = np.array([seen + 1], np.int32)
        self.tokens: list[int] = []
        self._most = most

    def advance(self, token: int) -> None:
        self.tokens.append(token)
        self.mask += 1
        if self.mask[0] > self._most:
            raise GrammarError("enough")


class ManualGuides:
    """Gives guides when the test says so."""

    def __init__(self) -> None:
        self.futures: list[Future[Guide]] = []
        self.emitted: list[Tokens] = []

    def begin(self, spec: GrammarSpec, emitted: Tokens) -> Future[Guide]:
        self.futures.append(Future())
        self.emitted.append(emitted)
        return self.futures[-1]

    def give(self, index: int, most: int = 99) -> CountingGuide:
        guide = CountingGuide(len(self.emitted[index]), most)
        self.futures[index].set_result(guide)
        return guide


def guided(prompt: list[int], max_tokens: int = 8, **changes: Any) -> GenerateRequest:
    sampling = SamplingParams(max_tokens, grammar=GrammarSpec(GrammarKind.REGEX, "a", (1,)))
    return make_request(prompt, sampling=sampling, **changes)


@pytest.fixture
def guides() -> ManualGuides:
    return ManualGuides()


def stand_with(guides: ManualGuides, **limits: Any) -> Stand:
    return make_stand(grammars=guides, **limits)


def masks_of(plan: StepPlan) -> dict[int, int]:
    """By row of the step."""
    edits = plan.sampling.edits
    return {} if edits is None else dict(zip(edits.masked_rows.tolist(), edits.masks[:, 0].tolist(), strict=True))


def test_a_request_waits_for_its_grammar_and_nobody_waits_for_the_request(guides: ManualGuides) -> None:
    stand = stand_with(guides)
    stand.submit(0, Work.GENERATE, guided([1, 2, 3]))
    stand.submit(1, Work.GENERATE, make_request([4, 5, 6], 4))
    stand.run()
    assert (len(stand.tokens[1]), stand.tokens.get(0)) == (4, None)
    assert [event.key.slot for event in stand.of_kind(QueuedEvent)] == [0]
    guide = guides.give(0)
    stand.run()
    assert len(stand.tokens[0]) == 8
    assert guide.tokens == stand.tokens[0][:-1]  # the last one ended the choice


def test_every_step_carries_the_mask_after_the_tokens_so_far(guides: ManualGuides) -> None:
    stand = stand_with(guides)
    stand.submit(0, Work.GENERATE, make_request([9, 9], 8))
    stand.submit(1, Work.GENERATE, guided([1, 2, 3], emitted=(7, 7)))
    assert guides.emitted == [(7, 7)]
    guides.give(0)
    seen = []
    while (plan := stand.scheduler.plan(0.0)) is not None:
        seen.append(masks_of(plan))
        stand.scheduler.commit(plan, stand.runner.run(plan), 0.0)
    assert seen == [{1: 3}, {1: 4}, {1: 5}, {1: 6}, {1: 7}, {1: 8}, {}, {}]


def test_nothing_is_planned_ahead_of_a_token_that_a_mask_depends_on(guides: ManualGuides) -> None:
    stand = stand_with(guides)
    stand.submit(0, Work.GENERATE, guided([1, 2, 3]))
    guides.give(0)
    plan = stand.scheduler.plan(0.0)
    assert plan is not None
    assert stand.scheduler.plan(0.0) is None
    stand.scheduler.commit(plan, stand.runner.run(plan), 0.0)
    assert stand.scheduler.plan(0.0) is not None


def test_a_grammar_that_leads_nowhere_costs_its_own_request(guides: ManualGuides) -> None:
    stand = stand_with(guides)
    stand.submit(0, Work.GENERATE, guided([1, 2, 3]))
    stand.submit(1, Work.GENERATE, make_request([4, 5, 6], 8))
    guides.give(0, most=3)
    stand.run()
    (refused,) = stand.of_kind(RefusedEvent)
    assert (refused.key.slot, refused.code) == (0, FailureCode.GRAMMAR)
    assert len(stand.tokens[0]) == 3
    assert len(stand.tokens[1]) == 8
    assert stand.pool.num_free == stand.pool.num_blocks


def test_one_that_cannot_be_compiled_is_refused_and_the_next_is_served(guides: ManualGuides) -> None:
    stand = stand_with(guides)
    stand.submit(0, Work.GENERATE, guided([1, 2, 3]))
    stand.submit(1, Work.GENERATE, guided([4, 5, 6]))
    guides.give(1)
    guides.futures[0].set_exception(GrammarError("no such rule"))
    stand.run()
    (refused,) = stand.of_kind(RefusedEvent)
    assert (refused.key.slot, refused.code) == (0, FailureCode.BAD_REQUEST)
    assert "no such rule" in refused.message
    assert len(stand.tokens[1]) == 8


def test_cancelled_and_expired_ones_are_not_compiled_any_more(guides: ManualGuides) -> None:
    stand = stand_with(guides)
    for slot in range(2):
        stand.submit(slot, Work.GENERATE, guided([1, 2, 3], queue_timeout_s=5.0))
    stand.scheduler.cancel(SequenceKey("a", 0, 0), 0.0)
    assert stand.step(now=6.0) is None
    assert [event.code for event in stand.of_kind(RefusedEvent)] == [FailureCode.DEADLINE]
    assert all(future.cancelled() for future in guides.futures)


def test_preempted_sequences_keep_their_place_in_the_grammar(guides: ManualGuides) -> None:
    stand = stand_with(guides, num_blocks=8, reserve_tokens=0, max_preemptions=3)
    found = []
    for slot in range(3):
        stand.submit(slot, Work.GENERATE, guided([slot, 2, 3], 14))
        found.append(guides.give(slot))
    stand.run()
    assert stand.of_kind(PreemptedEvent)
    assert [guide.tokens for guide in found] == [stand.tokens[slot][:-1] for slot in range(3)]


def test_a_reservation_goes_on_after_the_token_that_came_with_its_blocks(guides: ManualGuides) -> None:
    stand = stand_with(guides)
    key = stand.submit(0, Work.RESERVE, guided([1, 2, 3, 4, 5]))
    assert stand.step() is None
    guide = guides.give(0)
    stand.step()
    stand.scheduler.kv_arrived(key, (6,), 0.0)
    assert guide.tokens == [6]
    plan = stand.scheduler.plan(0.0)
    assert plan is not None
    assert masks_of(plan) == {0: 2}


def test_without_grammars_a_worker_says_so() -> None:
    stand = make_stand()
    stand.submit(0, Work.GENERATE, guided([1, 2, 3]))
    assert [event.code for event in stand.of_kind(RefusedEvent)] == [FailureCode.BAD_REQUEST]
