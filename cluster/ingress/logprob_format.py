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


def completion_logprobs(
    codec: TextCodec, tokens: Sequence[int], logprobs: Sequence[TokenLogprob | None], offset: int
) -> tuple[dict[str, Any], int]:
    """The `logprobs` object of `/v1/completions` for these tokens, and the text offset after them.

    A first token that is echoed has no logprob: null.
    """
    texts = [token_text(codec, token) for token in tokens]
    offsets = []
    for text in texts:
        offsets.append(offset)
        offset += len(text)
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
    return {"tokens": texts, "token_logprobs": chosen, "top_logprobs": top, "text_offset": offsets}, offset


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
