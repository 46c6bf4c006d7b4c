"""Stop strings: the same result for every cut of the text, and nothing of a stop shown too early."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.cluster.stop_strings import StopMatcher

ALPHABET = "abc"


def run(stops: list[str], pieces: list[str], include: bool = False) -> tuple[str, str | None]:
    matcher = StopMatcher(stops, include)
    out = "".join(matcher.push(piece) for piece in pieces)
    return out + ("" if matcher.stopped else matcher.finish()), matcher.stopped


@settings(deadline=None, max_examples=500)
@given(
    st.lists(st.text(ALPHABET, min_size=1, max_size=5), min_size=1, max_size=4, unique=True),
    st.lists(st.text(ALPHABET, max_size=6), max_size=8),
    st.booleans(),
)
def test_against_the_definition(stops: list[str], pieces: list[str], include: bool) -> None:
    """The stop that completes first ends the text; of those that complete together the longest."""
    text = "".join(pieces)
    ends = [(text.find(s) + len(s), text.find(s), s) for s in stops if s in text]
    expected: tuple[str, str | None] = (text, None)
    if ends:
        end, start, stop = min(ends)
        expected = (text[: end if include else start], stop)
    assert run(stops, pieces, include) == expected
    assert run(stops, list(text), include) == expected
    assert run(stops, [text], include) == expected


@settings(deadline=None, max_examples=200)
@given(st.lists(st.text(ALPHABET, min_size=1, max_size=4), min_size=1, max_size=3), st.text(ALPHABET, max_size=30))
def test_held_text_is_short(stops: list[str], text: str) -> None:
    """Never more waits than one character less than the longest stop."""
    matcher, shown = StopMatcher(stops), ""
    for count, letter in enumerate(text, 1):
        shown += matcher.push(letter)
        if matcher.stopped is not None:
            return
        assert count - len(shown) < max(map(len, stops))


def test_examples() -> None:
    assert run(["bc", "abcd"], ["abcd"]) == ("a", "bc")
    assert run(["bcd", "abcd"], ["xab", "cd"]) == ("x", "abcd")
    assert run(["\n\n"], ["a\n", "b\n", "\nc"]) == ("a\nb", "\n\n")
    assert run(["stop"], ["no sto", "ps? no sto"]) == ("no ", "stop")
    assert run(["xyz"], ["ends in xy"]) == ("ends in xy", None)
