"""What is done to one row's logits, spelled out token by token in float64: the judge of the batched code."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from penstock.workers.protocol import SamplingParams


def banned_tokens(sampling: SamplingParams, prompt: Sequence[int], generated: Sequence[int]) -> set[int]:
    """Stop tokens before `min_tokens`, and the last tokens of bad words whose other tokens come just before."""
    context = [*prompt, *generated]
    banned = set(sampling.stop_token_ids) if len(generated) < sampling.min_tokens else set()
    for word in sampling.bad_words:
        before = list(word[:-1])
        if not before or context[-len(before) :] == before:
            banned.add(word[-1])
    return banned


def edit_row(
    logits: Sequence[float],
    sampling: SamplingParams,
    prompt: Sequence[int],
    generated: Sequence[int],
    grammar: set[int] | None = None,
) -> list[float]:
    """The logits from which the next token is sampled: penalties, biases, bans, then what a grammar allows."""
    edited = [float(value) for value in logits]
    counts = Counter(generated)
    if sampling.repetition_penalty != 1:
        for token in {*prompt, *generated}:
            value = edited[token]
            edited[token] = value / sampling.repetition_penalty if value > 0 else value * sampling.repetition_penalty
    for token, count in counts.items():
        edited[token] -= count * sampling.frequency_penalty + sampling.presence_penalty
    for token, bias in sampling.logit_bias:
        edited[token] += bias
    unlisted = edited
    if sampling.allowed_token_ids is not None:
        allowed = set(sampling.allowed_token_ids)
        edited = [value if token in allowed else -math.inf for token, value in enumerate(edited)]
    banned = banned_tokens(sampling, prompt, generated)
    without = [-math.inf if token in banned else value for token, value in enumerate(edited)]
    listed = without if max(without) > -math.inf else edited
    if grammar is None:
        return listed
    if not any(listed[token] > -math.inf for token in grammar):
        listed = unlisted
    return [value if token in grammar else -math.inf for token, value in enumerate(listed)]
