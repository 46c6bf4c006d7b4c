"""What a caller is shown of a choice does not depend on how its tokens were cut into deltas."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.cluster.ingress.call import OutputOptions
from penstock.cluster.ingress.choice_text import ChoiceText
from penstock.cluster.text import TextCodec
from penstock.router.emission import Delta, TokenLogprob
from penstock.workers.protocol import EndReason


def shown(
    codec: TextCodec, tokens: list[int], cuts: list[int], output: OutputOptions, end: EndReason, min_tokens: int = 0
) -> tuple[str, list[int], str | None]:
    reader = ChoiceText(0, codec, output, min_tokens)
    text, used = "", []
    edges = [0, *sorted(c for c in cuts if c < len(tokens)), len(tokens)]
    for start, stop in pairwise(edges):
        piece_tokens = tuple(tokens[start:stop])
        logprobs = tuple(TokenLogprob(-1.0) for _ in piece_tokens)
        piece = reader.read(Delta(piece_tokens, logprobs, end if stop == len(tokens) else EndReason.NONE))
        assert piece.logprobs is not None
        assert len(piece.logprobs) == len(piece.tokens)
        text += piece.text
        used += piece.tokens
        if piece.finish_reason is not None:
            return text, used, piece.finish_reason
    return text, used, None


@settings(deadline=None, max_examples=150)
@given(
    text=st.text(alphabet="ab☃é ", max_size=24),
    stops=st.lists(st.text(alphabet="ab☃é", min_size=1, max_size=4), max_size=3, unique=True),
    cuts=st.lists(st.integers(1, 60), max_size=6, unique=True),
    include=st.booleans(),
)
def test_any_cut_gives_the_same(codec: TextCodec, text: str, stops: list[str], cuts: list[int], include: bool) -> None:
    tokens = [*codec.encode(text, "prompt"), 10]
    output = OutputOptions(stops=tuple(stops), include_stop=include)
    by_token = shown(codec, tokens, list(range(1, len(tokens))), output, EndReason.LENGTH)
    assert shown(codec, tokens, cuts, output, EndReason.LENGTH) == by_token
    whole = codec.decode(tokens)
    ends = [(whole.find(s) + len(s), whole.find(s), s) for s in stops if s in whole]
    if not ends:
        assert by_token == (whole, tokens, "length")
        return
    end, start, _ = min(ends)
    assert by_token[0] == whole[: end if include else start]
    assert by_token[2] == "stop"


@settings(deadline=None, max_examples=150)
@given(
    data=st.lists(st.integers(3, 329), min_size=1, max_size=24),
    stops=st.lists(st.text(alphabet="abé☃\ufffd", min_size=1, max_size=3), min_size=1, max_size=3, unique=True),
    cuts=st.lists(st.integers(1, 30), max_size=6, unique=True),
    min_tokens=st.integers(0, 8),
)
def test_any_tokens_and_a_least_length(
    codec: TextCodec, data: list[int], stops: list[str], cuts: list[int], min_tokens: int
) -> None:
    """Tokens that are no whole characters, and stops that do not count at first: any cut gives the same, no stop string
    that counts leaks, and nothing of the text before it is lost."""
    output = OutputOptions(stops=tuple(stops))
    by_token = shown(codec, data, list(range(1, len(data))), output, EndReason.LENGTH, min_tokens)
    assert shown(codec, data, cuts, output, EndReason.LENGTH, min_tokens) == by_token
    text, used, reason = by_token
    if len(data) <= min_tokens:
        assert by_token == (codec.decode(data), data, "length")
        return
    assert len(used) > min_tokens or reason == "length"
    stream = codec.stream()
    exempt = "".join(stream.push([token]) for token in data[:min_tokens])
    assert text.startswith(exempt)
    assert not any(stop in text[len(exempt) :] for stop in stops)
    assert codec.decode(data).startswith(text)


@pytest.mark.parametrize("include", [False, True])
def test_the_stop_tokens_text_follows_the_option(codec: TextCodec, include: bool) -> None:
    tokens = codec.encode("hello fox", "prompt")
    output = OutputOptions(include_stop=include)
    text, used, reason = shown(codec, tokens, [1], output, EndReason.STOP)
    assert text == codec.decode(tokens if include else tokens[:-1])
    assert (used, reason) == (tokens, "stop")


def test_a_cut_character_at_the_end_becomes_a_replacement(codec: TextCodec) -> None:
    tokens = codec.encode("☃", "prompt")[:-1]
    assert shown(codec, tokens, [1], OutputOptions(), EndReason.LENGTH)[0] == "\ufffd"
