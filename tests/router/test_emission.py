"""Token rows late, twice, split and out of order: what comes out is the text, once."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.router.emission import Delta, Emission, TokenLogprob
from penstock.workers.protocol import EndReason, GenerateRequest, SamplingParams

TEXT = [(7 * index + 3) % 101 for index in range(40)]


@st.composite
def deliveries(draw: st.DrawFn) -> list[tuple[int, int, int]]:
    """(attempt, start, stop) rows that cover the text at attempt 1, in any order, some twice, some stale."""
    borders = sorted({0, len(TEXT), *draw(st.lists(st.integers(1, len(TEXT) - 1), max_size=12))})
    rows = [(1, a, b) for a, b in itertools.pairwise(borders)]
    rows += draw(st.lists(st.sampled_from(rows), max_size=6))
    rows += draw(st.lists(st.tuples(st.just(0), st.integers(0, 20), st.integers(21, 40)), max_size=3))
    return draw(st.permutations(rows))


@given(deliveries(), st.data())
@settings(deadline=None, max_examples=150)
def test_any_order_gives_the_text_once(rows: list[tuple[int, int, int]], data: st.DataObject) -> None:
    emission = Emission(len(TEXT), logprobs=True)
    emission.begin_attempt(1)
    read: list[int] = []
    logprobs: list[float] = []
    completions = 0
    for attempt, start, stop in rows:
        tokens = TEXT[start:stop] if attempt else [999] * (stop - start)
        end = EndReason.LENGTH if stop == len(TEXT) else EndReason.NONE
        shown = [TokenLogprob(-float(index)) for index in range(start, stop)]
        completions += emission.apply(attempt, start, tokens, end, shown)
        emission.check_integrity()
        if data.draw(st.booleans()):
            delta = emission.take()
            read += delta.tokens
            logprobs += [each.logprob for each in delta.logprobs or ()]
            assert read == TEXT[: len(read)]
    last = emission.take()
    assert read + list(last.tokens) == TEXT
    assert logprobs + [each.logprob for each in last.logprobs or ()] == [-float(i) for i in range(len(TEXT))]
    assert last.end is EndReason.LENGTH
    assert completions == 1
    assert not emission.pending
    assert emission.take() == Delta((), (), EndReason.LENGTH)


def test_a_gap_is_waited_for() -> None:
    emission = Emission(5)
    assert not emission.apply(0, 1, [11, 12], EndReason.STOP)
    assert not emission.pending
    assert emission.apply(0, 0, [10])
    assert emission.take() == Delta((10, 11, 12), None, EndReason.STOP)


def test_progress_is_told_only_when_there_is_some() -> None:
    told: list[int] = []
    emission = Emission(5, on_progress=lambda: told.append(1))
    emission.apply(0, 1, [2])
    assert told == []
    emission.apply(0, 0, [1])
    assert told == [1]
    emission.apply(0, 0, [1])
    assert told == [1]
    emission.apply(0, 2, [], EndReason.STOP)
    assert told == [1, 1]


def test_a_new_attempt_drops_what_the_old_one_sent_ahead() -> None:
    emission = Emission(10)
    emission.begin_attempt(1)
    emission.apply(1, 0, [5])
    emission.apply(1, 2, [77])
    emission.begin_attempt(2)
    assert not emission.apply(1, 1, [66])
    emission.apply(2, 1, [6])
    assert emission.tokens == [5, 6]
    emission.check_integrity()


def test_marks_fire_once_at_their_count() -> None:
    fired: list[int] = []
    emission = Emission(10)
    emission.begin_attempt(1)
    emission.notify_at(2, lambda: fired.append(emission.count))
    emission.apply(1, 0, [1])
    assert fired == []
    emission.apply(1, 1, [2, 3])
    emission.apply(1, 3, [4])
    assert fired == [3]
    emission.notify_at(4, lambda: fired.append(-1))
    assert fired == [3, -1]
    emission.notify_at(6, lambda: fired.append(-2))
    emission.begin_attempt(2)
    emission.apply(2, 4, [5, 6])
    assert fired == [3, -1]


@pytest.mark.parametrize(
    ("start", "tokens", "logprobs"),
    [(-1, [1], None), (0, [1] * 6, None), (5, [1], None), (0, [1, 2], [TokenLogprob(0.0)])],
)
def test_impossible_rows_are_counted_and_ignored(
    start: int, tokens: list[int], logprobs: list[TokenLogprob] | None
) -> None:
    emission = Emission(5)
    assert not emission.apply(0, start, tokens, 0, logprobs)
    assert emission.tokens == []
    assert emission.ignored_rows == 1


def test_an_end_before_tokens_that_are_out_is_ignored() -> None:
    emission = Emission(5)
    emission.apply(0, 0, [1, 2, 3])
    assert not emission.apply(0, 0, [1], EndReason.STOP)
    assert not emission.ended


def test_nothing_changes_after_the_end() -> None:
    emission = Emission(5)
    emission.apply(0, 0, [1], EndReason.STOP)
    assert not emission.apply(0, 1, [2])
    assert emission.tokens == [1]


def test_what_is_held_is_bounded() -> None:
    emission = Emission(8)
    for start in range(1, 8):
        emission.apply(0, start, [0] * (8 - start))
    emission.check_integrity()
    assert sum(len(row.tokens) for row in emission._held.values()) <= 8


def test_resumed_tokens_are_not_handed_out_again() -> None:
    request = GenerateRequest("r", (1, 2), SamplingParams(max_tokens=4, logprobs=0), emitted=(8, 9))
    emission = Emission.for_request(request)
    emission.apply(0, 2, [10], 0, [TokenLogprob(-1.0)])
    assert emission.take() == Delta((10,), (TokenLogprob(-1.0),), EndReason.NONE)
    emission.conclude(EndReason.LENGTH)
    assert emission.take() == Delta((), (), EndReason.LENGTH)


def test_the_check_checks() -> None:
    emission = Emission(8, logprobs=True)
    emission.apply(0, 0, [1])
    emission.tokens.append(3)
    with pytest.raises(ValueError, match="logprobs"):
        emission.check_integrity()
