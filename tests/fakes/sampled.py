"""Seeded requests whose tokens must not depend on where, when and beside whom they are computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fakes.exactness import mixed_prompts
from fakes.variants import request

from penstock.workers.protocol import GenerateRequest, SamplingParams

COUNT = 32  # generated tokens
KINDS: tuple[dict[str, Any], ...] = (
    {"temperature": 1.0},
    {"temperature": 0.6},
    {"temperature": 0.8, "top_k": 40},
    {"temperature": 0.9, "top_p": 0.9},
    {"temperature": 1.2, "min_p": 0.02},
    {"temperature": 1.0, "top_k": 200, "top_p": 0.95, "min_p": 0.01},
    {"temperature": 2.0, "top_k": 5},
    {"temperature": 0.7, "top_p": 0.5, "min_p": 0.05},
)
SEEDS = (0, 1, 2**63 + 11, 2**64 - 1, 4711, 77, 12345678901, 5)


def fields(vocab: int) -> list[dict[str, Any]]:
    """One request of every kind, as the fields of a completions body."""
    prompts = mixed_prompts(vocab, 20, longest=100, seed=3)[12:]
    return [
        {"prompt": list(prompt), "max_tokens": COUNT, "seed": seed, **kind}
        for prompt, seed, kind in zip(prompts, SEEDS, KINDS, strict=True)
    ]


def others(vocab: int) -> list[dict[str, Any]]:
    """32 more, greedy and sampled, that are there to be in the way."""
    prompts = mixed_prompts(vocab, 32, longest=120, seed=4)
    return [
        {
            "prompt": list(prompt),
            "max_tokens": COUNT,
            "seed": 900 + n,
            **(KINDS[n % 8] if n % 3 else {"temperature": 0}),
        }
        for n, prompt in enumerate(prompts)
    ]


def as_requests(bodies: Sequence[dict[str, Any]], choice: int = 0) -> list[GenerateRequest]:
    """The same as the HTTP front hands them on."""
    requests = []
    for number, body in enumerate(bodies):
        given = {key: value for key, value in body.items() if key != "prompt"}
        requests.append(request(f"s{number}.{choice}", tuple(body["prompt"]), SamplingParams(**given, choice=choice)))
    return requests


EDITED_KINDS: tuple[dict[str, Any], ...] = (
    {"temperature": 1.0, "repetition_penalty": 1.3},
    {"temperature": 0.8, "presence_penalty": 1.5, "frequency_penalty": 0.7, "top_p": 0.95},
    {"temperature": 0.0, "frequency_penalty": -0.5, "repetition_penalty": 0.9},
    {"temperature": 1.0, "logit_bias": ((5, 6.0), (17, -50.0), (40, 3.5)), "top_k": 60},
    {"temperature": 1.3, "allowed_token_ids": (*range(30), 77), "min_p": 0.01},
    {"temperature": 0.9, "allowed_token_ids": (1, 2, 3, 4), "bad_words": ((1, 2), (2,), (3, 3), (4, 1, 4))},
    {"temperature": 2.0, "stop_token_ids": tuple(range(0, 200, 2)), "min_tokens": 12},
    {
        "temperature": 0.7,
        "presence_penalty": 0.4,
        "repetition_penalty": 1.1,
        "logit_bias": ((9, 5.0),),
        "bad_words": ((9, 9), (9, 11)),
        "stop_token_ids": (9,),
        "min_tokens": 20,
    },
)


def edited_requests(vocab: int) -> list[GenerateRequest]:
    """One request of every kind of logit edit, alone or with others; seeded."""
    prompts = mixed_prompts(vocab, 20, longest=90, seed=9)[12:]
    return [
        request(f"e{number}", tuple(prompt), SamplingParams(max_tokens=COUNT, seed=seed, **kind))
        for number, (prompt, seed, kind) in enumerate(zip(prompts, SEEDS, EDITED_KINDS, strict=True))
    ]
