"""A request that names tokens which the model does not have is told so, with the field's name."""

from typing import Any

import pytest

from penstock.workers.protocol import Generate, GenerateRequest, SamplingParams, token_array
from penstock.workers.request_check import MAX_BAD_WORD_TOKENS, problem_with_tokens
from penstock.workers.wire import decode_to_worker, encode

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


def test_prompts_off_the_wire_are_checked_by_what_is_known_of_them():
    for tokens in ((), (3, 99, 5), (3, 100)):
        request = GenerateRequest("r", tokens, SamplingParams(max_tokens=1))
        read = decode_to_worker(encode(Generate(0, 0, request)))
        assert isinstance(read, Generate)
        assert problem_with_tokens(read.request, 100) == problem_with_tokens(request, 100)
        assert token_array(read.request.prompt).tolist() == token_array(tokens).tolist() == list(tokens)
    with pytest.raises(OverflowError):
        token_array((1, 1 << 31))
