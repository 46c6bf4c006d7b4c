"""Logprobs as OpenAI's two APIs spell them.

Used by the two formats. Values are natural logs; minus infinity and NaN, which JSON cannot hold, become -9999.0.
A token whose bytes are no whole text is spelled `bytes:\\xe2\\x98` so that distinct tokens stay distinct keys.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from penstock.cluster.text import TextCodec
from penstock.router.emission import TokenLogprob

FLOOR = -9999.0


def finite(value: float) -> float:
    """The value, or the floor where JSON has no word for it."""
    return value if math.isfinite(value) else FLOOR


def token_text(codec: TextCodec, token: int) -> str:
    """One token as a short readable text; ids where there is no tokenizer."""
    if not codec.has_tokenizer:
        return f"token_id:{token}"
    piece = codec.table.pieces[token]
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)


class TextOffsets:
    """Where the tokens of one choice stand in its answer's text, in characters.

    A token that shows nothing, or only a part of a character, stands where the next text begins.
    """

    __slots__ = ("_at", "_codec", "_stream")

    def __init__(self, codec: TextCodec, skip_special_tokens: bool) -> None:
        self._codec = codec
        self._stream = codec.stream(skip_special_tokens)
        self._at = 0

    def of_echo(self, tokens: Sequence[int], text: str) -> list[int]:
        """Of the prompt's tokens in its text, which is as the caller wrote it: without the special tokens and the
        leading space that a tokenizer puts before it."""
        stream, offsets = self._codec.stream(skip_special_tokens=False), []
        for token in tokens:
            piece = stream.push((token,))
            shown = next((form for form in (piece, piece.removeprefix(" ")) if text.startswith(form, self._at)), "")
            offsets.append(self._next(token, shown))
        self._at = len(text)
        return offsets

    def of_generated(self, tokens: Sequence[int]) -> list[int]:
        """Of the tokens that come next."""
        return [self._next(token, self._stream.push((token,))) for token in tokens]

    def _next(self, token: int, shown: str) -> int:
        """Where a token stands that adds `shown`: behind what it adds for bytes before it that became no character."""
        before, own = self._at, token_text(self._codec, token)
        self._at += len(shown)
        return self._at - len(own) if own and shown.endswith(own) else before


def completion_logprobs(
    codec: TextCodec, tokens: Sequence[int], logprobs: Sequence[TokenLogprob | None], offsets: list[int]
) -> dict[str, Any]:
    """The `logprobs` object of `/v1/completions` for these tokens. A first token that is echoed has none: null."""
    texts = [token_text(codec, token) for token in tokens]
    top: list[dict[str, float] | None] = []
    for text, entry in zip(texts, logprobs, strict=True):
        if entry is None:
            top.append(None)
            continue
        named = {text: finite(entry.logprob)}
        for token, value in entry.top:
            named.setdefault(token_text(codec, token), finite(value))
        top.append(named)
    chosen = [None if entry is None else finite(entry.logprob) for entry in logprobs]
    return {"tokens": texts, "token_logprobs": chosen, "top_logprobs": top, "text_offset": offsets}


def chat_logprobs(codec: TextCodec, tokens: Sequence[int], logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
    """The `logprobs` object of `/v1/chat/completions` for these tokens."""
    content = []
    for token, entry in zip(tokens, logprobs, strict=True):
        top = [_named(codec, other, value) for other, value in entry.top]
        content.append({**_named(codec, token, entry.logprob), "top_logprobs": top})
    return {"content": content}


def prompt_logprobs(
    codec: TextCodec, tokens: Sequence[int], scores: Sequence[TokenLogprob | None]
) -> list[dict[str, Any] | None]:
    """vLLM's `prompt_logprobs`: per token a map from token id to its logprob, text and rank; null for the first.

    The rank of a token that is not among the alternatives is not known: null.
    """
    told: list[dict[str, Any] | None] = []
    for token, entry in zip(tokens, scores, strict=True):
        if entry is None:
            told.append(None)
            continue
        ranked = {other: (value, rank) for rank, (other, value) in enumerate(entry.top, 1)}
        ranked.setdefault(token, (entry.logprob, 0))
        told.append(
            {
                str(other): {
                    "logprob": finite(value),
                    "rank": rank or None,
                    "decoded_token": token_text(codec, other),
                }
                for other, (value, rank) in ranked.items()
            }
        )
    return told


def _named(codec: TextCodec, token: int, logprob: float) -> dict[str, Any]:
    piece = codec.table.pieces[token]
    named = {"token": token_text(codec, token), "logprob": finite(logprob)}
    return {**named, "bytes": list(piece) if codec.has_tokenizer else None}
