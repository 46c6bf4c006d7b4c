"""Answers of the API as the handle's typed values."""

from __future__ import annotations

import base64
import json
import math

import numpy as np
import pytest

from penstock.cluster.client_answers import completion_of, embeddings_of, problem_of, read_event, score_of
from penstock.workers.errors import RefusedError, RequestError
from penstock.workers.protocol import FailureCode

USAGE = {"prompt_tokens": 2, "completion_tokens": 1, "total_tokens": 3, "prompt_tokens_details": {"cached_tokens": 1}}
SCORED = [
    None,
    {
        "9": {"logprob": -0.5, "rank": 1, "decoded_token": "nine"},
        "7": {"logprob": -4.0, "rank": None, "decoded_token": "seven"},
    },
]


def test_a_prompt_token_that_is_none_of_the_likely_ones_is_not_listed_among_them() -> None:
    choice = {"index": 0, "text": "", "finish_reason": "length", "prompt_token_ids": [5, 7], "prompt_logprobs": SCORED}
    score = score_of({"id": "a", "model": "m", "choices": [choice], "usage": USAGE}, {})
    assert [(entry.token, entry.logprob, dict(entry.top)) for entry in score.logprobs] == [
        ("token_id:5", None, {}),
        ("seven", -4.0, {"nine": -0.5}),
    ]
    assert (score.total, score.perplexity) == (-4.0, math.exp(4.0))


def test_a_chat_tells_its_prompt_once() -> None:
    choices = [{"index": 0, "message": {"content": "hi"}, "finish_reason": "stop", "token_ids": [3]}]
    answer = {"id": "a", "model": "m", "choices": choices, "usage": USAGE}
    whole = completion_of({**answer, "prompt_token_ids": [5, 7], "prompt_logprobs": SCORED}, {"x-request-id": "r"})
    assert (whole.text, whole.token_ids, whole.request_id) == ("hi", (3,), "r")
    assert whole.choices[0].prompt_token_ids == (5, 7)
    assert whole.prompt_logprobs is not None
    assert whole.usage.cached_tokens == 1
    assert completion_of(answer, {}).request_id == "a"


def test_vectors_stand_in_the_order_of_their_inputs() -> None:
    rows = [
        {"index": index, "embedding": base64.b64encode(np.full(3, index, "<f4").tobytes()).decode()} for index in (1, 0)
    ]
    found = embeddings_of({"data": rows, "usage": {"prompt_tokens": 4, "total_tokens": 4}}, {})
    assert found.vectors.tolist() == [[0.0] * 3, [1.0] * 3]
    assert found.vectors.flags.writeable


@pytest.mark.parametrize(
    ("status", "kind", "code", "error"),
    [
        (400, "invalid_request_error", "out_of_range", RequestError),
        (403, "permission_error", "model_not_allowed", RequestError),
        (429, "rate_limit_exceeded", "requests_per_minute", FailureCode.TENANT_LIMIT),
        (503, "service_unavailable", "queue_full", FailureCode.QUEUE_FULL),
        (503, "service_unavailable", "not_ready", FailureCode.OVERLOADED),
        (504, "timeout", "deadline", FailureCode.DEADLINE),
        (500, "server_error", "internal", FailureCode.INTERNAL),
    ],
)
def test_errors_are_typed_by_status_and_code(status: int, kind: str, code: str, error: object) -> None:
    body = json.dumps({"error": {"message": "no", "type": kind, "param": "p", "code": code}}).encode()
    found = problem_of(status, body, {"retry-after": "7"})
    assert str(found) == "no"
    if isinstance(found, RequestError):
        assert (error, found.field, found.code) == (RequestError, "p", code)
    else:
        assert isinstance(found, RefusedError)
        assert (found.code, found.retry_after_s) == (error, 7.0)


@pytest.mark.parametrize("body", [b"", b"upstream connect error", b"{}", b'{"error":"Unauthorized"}', b"[1]"])
def test_bodies_that_are_not_ours_keep_the_status(body: bytes) -> None:
    assert str(problem_of(502, body, {})) == "HTTP 502"


def test_an_error_event_raises() -> None:
    with pytest.raises(RefusedError, match="gone"):
        read_event('data: {"error": {"message": "gone", "type": "service_unavailable", "code": "worker_lost"}}')
    assert read_event("data: [DONE]").done
    assert read_event(": ping").chunks == ()
