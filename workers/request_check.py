"""Whether a request names only tokens that this worker's model has. Pure; asked by `engine.py` before a request queues.

Such a request would break the step that computes it, and every other request in that step with it. What depends on the
worker's memory is the scheduler's question (`scheduler/admission.py`).
"""

from __future__ import annotations

from collections.abc import Iterable

from penstock.workers.grammar_spec import MAX_GRAMMAR_BYTES
from penstock.workers.protocol import GenerateRequest, PackedTokens, SamplingParams, Tokens

MAX_BIAS = 1e6  # so that no sum overflows; far beyond what any logit can outweigh
MAX_BAD_WORD_TOKENS = 16_384  # of one request: all of its bad words are compared with its tokens at every step


def problem_with_tokens(request: GenerateRequest, vocab: int) -> str | None:
    """Why this request can never be served by a model with ids below `vocab`; None if it can."""
    if _largest(request.prompt) >= vocab or (request.emitted and _largest(request.emitted) >= vocab):
        return f"prompt: a token id is not below the vocabulary size {vocab}"
    return _problem_with_sampling(request.sampling, vocab)


def _largest(tokens: Tokens) -> int:
    return tokens.largest if isinstance(tokens, PackedTokens) else max(tokens, default=0)


def _problem_with_sampling(sampling: SamplingParams, vocab: int) -> str | None:
    if sampling.logit_bias:
        if _outside((token for token, _ in sampling.logit_bias), vocab):
            return f"logit_bias: a token id is not below the vocabulary size {vocab}"
        if not all(abs(value) <= MAX_BIAS for _, value in sampling.logit_bias):
            return f"logit_bias: a value lies outside [{-MAX_BIAS:g}, {MAX_BIAS:g}]"
    if sampling.allowed_token_ids is not None:
        if not sampling.allowed_token_ids:
            return "allowed_token_ids: is empty"
        if _outside(sampling.allowed_token_ids, vocab):
            return f"allowed_token_ids: a token id is not below the vocabulary size {vocab}"
    if sampling.grammar is not None:
        if len(sampling.grammar.text.encode(errors="replace")) > MAX_GRAMMAR_BYTES:
            return f"structured output: the grammar is longer than {MAX_GRAMMAR_BYTES} bytes"
        if not set(sampling.grammar.end_token_ids) <= set(sampling.stop_token_ids):
            return "structured output: a token that ends the grammar's text is no stop token"
    if sampling.bad_words:
        if not all(sampling.bad_words):
            return "bad_words: a sequence is empty"
        if sum(map(len, sampling.bad_words)) > MAX_BAD_WORD_TOKENS:
            return f"bad_words: more than {MAX_BAD_WORD_TOKENS} tokens in all"
        if _outside((token for word in sampling.bad_words for token in word), vocab):
            return f"bad_words: a token id is not below the vocabulary size {vocab}"
    return None


def _outside(tokens: Iterable[int], vocab: int) -> bool:
    return not all(0 <= token < vocab for token in tokens)
