"""Where tokens stand in the text of an answer."""

from __future__ import annotations

import pytest

from penstock.cluster.ingress.logprob_format import TextOffsets, token_text
from penstock.cluster.text import TextCodec


def shown_at(codec: TextCodec, text: str, tokens: list[int], offsets: list[int]) -> None:
    """Every whole token that the text shows is where its offset says."""
    assert offsets == sorted(offsets)
    for token, offset in zip(tokens, offsets, strict=True):
        piece = token_text(codec, token)
        if not piece.startswith(("bytes:", "<|")):
            assert text[offset : offset + len(piece)] == piece


@pytest.mark.parametrize("text", ["hello fox", "naïve ☕ café ☃!", "a<|im_end|>b", " \n"])
def test_offsets_are_characters_of_the_text(codec: TextCodec, text: str) -> None:
    tokens = codec.encode(text, "prompt")
    for skip in (True, False):
        walk = TextOffsets(codec, skip)
        offsets = walk.of_generated(tokens[:2]) + walk.of_generated(tokens[2:])
        shown_at(codec, codec.decode(tokens, skip), tokens, offsets)


def test_bytes_that_become_no_character_move_what_follows(codec: TextCodec) -> None:
    cut = codec.encode("☃", "prompt")[0]
    tokens = [cut, *codec.encode("a", "prompt"), cut]
    assert codec.decode(tokens) == "\ufffda\ufffd"
    assert TextOffsets(codec, skip_special_tokens=True).of_generated(tokens) == [0, 1, 2]


def test_what_follows_an_echo_begins_behind_it(codec: TextCodec) -> None:
    """Also where the prompt's tokens show more than its text: a tokenizer's first token, a leading space."""
    for text, tokens in (
        ("☕ fox", codec.encode("☕ fox", "prompt")),
        ("fox", [1, *codec.encode(" fox", "prompt")]),
        ("a<|im_end|>b", codec.encode("a<|im_end|>b", "prompt")),
    ):
        walk = TextOffsets(codec, skip_special_tokens=True)
        offsets = walk.of_echo(tokens, text)
        assert offsets[0] == 0
        assert max(offsets) < len(text)
        assert walk.of_generated(codec.encode("hello", "prompt"))[0] == len(text)
