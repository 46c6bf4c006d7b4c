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
    codec: TextCodec, tokens: Sequence[int], logprobs: Sequence[TokenLogprob], offset: int
) -> tuple[dict[str, Any], int]:
    """The `logprobs` object of `/v1/completions` for these tokens, and the text offset after them."""
    texts = [token_text(codec, token) for token in tokens]
    offsets = []
    for text in texts:
        offsets.append(offset)
        offset += len(text)
    top: list[dict[str, float]] = []
    for text, entry in zip(texts, logprobs, strict=True):
        named = {text: finite(entry.logprob)}
        for token, value in entry.top:
            named.setdefault(token_text(codec, token), finite(value))
        top.append(named)
    chosen = [finite(entry.logprob) for entry in logprobs]
    return {"tokens": texts, "token_logprobs": chosen, "top_logprobs": top, "text_offset": offsets}, offset


def chat_logprobs(codec: TextCodec, tokens: Sequence[int], logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
    """The `logprobs` object of `/v1/chat/completions` for these tokens."""
    content = []
    for token, entry in zip(tokens, logprobs, strict=True):
        top = [_named(codec, other, value) for other, value in entry.top]
        content.append({**_named(codec, token, entry.logprob), "top_logprobs": top})
    return {"content": content}


def _named(codec: TextCodec, token: int, logprob: float) -> dict[str, Any]:
    piece = codec.table.pieces[token]
    named = {"token": token_text(codec, token), "logprob": finite(logprob)}
    return {**named, "bytes": list(piece) if codec.has_tokenizer else None}
