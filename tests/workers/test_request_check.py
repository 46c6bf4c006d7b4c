"""A request that names tokens which the model does not have is told so, with the field's name."""

from typing import Any

import pytest

from penstock.workers.protocol import GenerateRequest, SamplingParams
from penstock.workers.request_check import MAX_BAD_WORD_TOKENS, problem_with_tokens

VOCAB = 100


def problem(prompt: tuple[int, ...] = (1, 99), emitted: tuple[int, ...] = (), **wish: Any) -> str | None:
    return problem_with_tokens(GenerateRequest("r", prompt, SamplingParams(9, **wish), emitted=emitted), VOCAB)


def test_what_is_inside_is_fine() -> None:
    assert problem() is None
    assert problem(logit_bias=((0, 1.0), (99, -1e6)), bad_words=((99,), (0, 1)), allowed_token_ids=(0, 99)) is None
    assert problem(stop_token_ids=(100_000,), min_tokens=3) is None  # never sampled, so never in the way


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"prompt": (100,)}, "prompt"),
        ({"emitted": (100,)}, "prompt"),
        ({"logit_bias": ((100, 1.0),)}, "logit_bias: a token id"),
        ({"logit_bias": ((-1, 1.0),)}, "logit_bias: a token id"),
        ({"logit_bias": ((1, 1e7),)}, "logit_bias: a value"),
        ({"logit_bias": ((1, float("nan")),)}, "logit_bias: a value"),
        ({"allowed_token_ids": ()}, "allowed_token_ids: is empty"),
        ({"allowed_token_ids": (1, 100)}, "allowed_token_ids: a token id"),
        ({"bad_words": ((1,), ())}, "bad_words: a sequence is empty"),
        ({"bad_words": ((1, 100, 2),)}, "bad_words: a token id"),
        ({"bad_words": ((1,) * (MAX_BAD_WORD_TOKENS + 1),)}, "bad_words: more than"),
    ],
)
def test_what_is_outside_is_named(fields: dict[str, Any], says: str) -> None:
    found = problem(**fields)
    assert found is not None
    assert found.startswith(says)
