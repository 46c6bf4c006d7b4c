"""Pairs that cannot hand over: whom a failure is held against, how long, and how much is remembered."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from penstock.router.pairs import Pairs
from penstock.router.settings import HealthSettings

SETTINGS = HealthSettings(breaker_failures=3, breaker_open_s=1.0, breaker_max_s=4.0)
PREFILL, DECODE = ("p0", "p1", "p2"), ("d0", "d1", "d2")
PAIR = st.tuples(st.sampled_from(PREFILL), st.sampled_from(DECODE))
HAPPENING = st.tuples(st.sampled_from(("tried", "failed", "succeeded")), PAIR, st.floats(0.0, 2.0))


def test_a_pair_opens_alone_and_both_serve_with_others() -> None:
    pairs = Pairs(SETTINGS)
    assert [pairs.failed("p0", "d0", 1.0) for _ in range(3)] == [[], [], []]
    assert [(p, d) for p in PREFILL for d in DECODE if not pairs.closed(p, d, 1.5)] == [("p0", "d0")]
    assert pairs.closed("p0", "d0", 2.0)


def test_who_fails_with_several_is_named() -> None:
    pairs = Pairs(SETTINGS)
    pairs.failed("p0", "d0", 0.0)
    assert pairs.failed("p1", "d0", 0.0) == ["d0"]
    assert pairs.failed("p1", "d1", 0.0) == ["p1"]
    assert pairs.failed("p0", "d1", 0.0) == ["p0", "d1"]
    pairs.succeeded("p1", "d0")
    assert pairs.failed("p0", "d0", 0.0) == ["p0"]


@given(st.lists(HAPPENING, max_size=60), st.sampled_from((*PREFILL, *DECODE)))
def test_what_is_held_are_pairs_whose_last_word_was_a_failure(
    happened: list[tuple[str, tuple[str, str], float]], gone: str
) -> None:
    pairs, failing, now = Pairs(SETTINGS), set[tuple[str, str]](), 0.0
    for what, pair, later in happened:
        now += later
        if what == "failed":
            blamed = pairs.failed(*pair, now)
            others = {each for each in failing if each != pair}
            assert blamed == [worker for worker in pair if any(worker in other for other in others)]
            failing.add(pair)
        elif what == "tried":
            pairs.tried(*pair, now)
        else:
            pairs.succeeded(*pair)
            failing.discard(pair)
        assert len(pairs) == len(failing)
        assert all(pairs.closed(p, d, now) for p in PREFILL for d in DECODE if (p, d) not in failing)
        assert all(pairs.closed(p, d, now + 4.0) for p in PREFILL for d in DECODE), "a pause ends"
    pairs.forget(gone)
    assert len(pairs) == sum(gone not in pair for pair in failing)
