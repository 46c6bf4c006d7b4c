"""Prompt scores in any pieces and order give the whole; what does not fit changes nothing."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.router.emission import Emission
from penstock.router.logprobs import PromptScores, TokenLogprob
from penstock.workers.protocol import EndReason, GenerateRequest, PromptLogprobs, SamplingParams

LENGTH, WIDEST = 20, 3


def piece(start: int, stop: int, attempt: int = 1, shift: float = 0.0) -> PromptLogprobs:
    """Token t has logprob -t and t % (WIDEST + 1) alternatives."""
    tokens = range(start, stop)
    counts = np.array([token % (WIDEST + 1) for token in tokens], np.uint8)
    flat = [(token * 10 + rank, -token - rank / 4) for token in tokens for rank in range(token % (WIDEST + 1))]
    return PromptLogprobs(
        1,
        attempt,
        start,
        np.array([-token + shift for token in tokens], np.float32),
        counts,
        np.array([token for token, _ in flat], np.int32),
        np.array([value for _, value in flat], np.float32),
    )


def whole(length: int = LENGTH) -> tuple[TokenLogprob | None, ...]:
    scores = [
        TokenLogprob(-float(t), tuple((t * 10 + rank, -t - rank / 4) for rank in range(t % (WIDEST + 1))))
        for t in range(1, length)
    ]
    return (None, *scores)


@given(st.permutations(range(1, LENGTH)), st.lists(st.tuples(st.integers(1, LENGTH), st.integers(0, 6)), max_size=5))
@settings(deadline=None, max_examples=60)
def test_any_order_and_any_repeats_give_the_whole(order: list[int], repeats: list[tuple[int, int]]) -> None:
    scores = PromptScores(LENGTH, WIDEST)
    known: set[int] = set()
    for token in order:
        assert not scores.complete
        assert scores.apply(piece(token, token + 1))
        known.add(token)
        read = scores.read()
        assert [index for index in range(1, LENGTH) if not math.isnan(read[index].logprob)] == sorted(known)  # type: ignore[union-attr]
    for start, count in repeats:
        assert scores.apply(piece(start, min(LENGTH, start + count)))
    assert scores.complete
    assert scores.read() == whole()


def test_the_first_token_has_no_score_even_if_one_is_sent() -> None:
    scores = PromptScores(3, WIDEST)
    assert scores.apply(piece(0, 3))
    assert scores.complete
    assert scores.read() == whole(3)
    assert PromptScores(1, 0).complete
    assert PromptScores(1, 0).read() == (None,)


def test_what_does_not_fit_changes_nothing() -> None:
    scores = PromptScores(5, 2)
    assert not scores.apply(piece(4, 6))
    assert not scores.apply(piece(3, 4))  # three alternatives, two were asked
    assert not scores.apply(piece(2**31, 2**31 + 1))
    assert all(score is None or math.isnan(score.logprob) for score in scores.read())


def request(prompt_logprobs: int | None = WIDEST) -> GenerateRequest:
    return GenerateRequest("r", tuple(range(LENGTH)), SamplingParams(4, prompt_logprobs=prompt_logprobs))


def test_an_emission_keeps_scores_over_attempts_and_ignores_old_ones() -> None:
    emission = Emission.for_request(request())
    emission.begin_attempt(1)
    emission.apply_scores(piece(1, 9))
    emission.begin_attempt(2)
    emission.apply_scores(piece(9, LENGTH, attempt=1))
    assert not emission.scored
    assert emission.ignored_rows == 1
    emission.apply_scores(piece(1, 12, attempt=2))
    emission.apply_scores(piece(12, LENGTH, attempt=2))
    assert emission.scored
    assert emission.prompt_logprobs == whole()
    assert not emission.pending
    emission.apply(2, 0, [7], EndReason.STOP)
    emission.apply_scores(piece(1, 2, attempt=2, shift=5.0))
    assert emission.prompt_logprobs == whole()


def test_who_asks_for_nothing_gets_nothing() -> None:
    emission = Emission.for_request(request(None))
    emission.apply_scores(piece(1, 4, attempt=0))
    assert emission.prompt_logprobs == ()
    assert emission.scored
    assert emission.embedding is None


def test_an_embedding_counts_for_its_attempt_only() -> None:
    emission = Emission.for_request(request(None))
    emission.begin_attempt(3)
    emission.apply_embedding(2, np.zeros(4, np.float32))
    assert emission.embedding is None
    emission.apply_embedding(3, np.ones(4, np.float32))
    assert emission.embedding is not None
    assert emission.embedding.tolist() == [1.0] * 4


def test_a_long_prompt_takes_few_bytes() -> None:
    scores = PromptScores(100_000, 5)
    held = sum(value.nbytes for value in vars(scores).values() if isinstance(value, np.ndarray))
    assert held == 100_000 * (1 + 4 + 1 + 8 * 5)
