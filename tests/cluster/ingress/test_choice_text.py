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
    codec: TextCodec, tokens: list[int], cuts: list[int], output: OutputOptions, end: EndReason
) -> tuple[str, list[int], str | None]:
    reader = ChoiceText(0, codec, output)
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
