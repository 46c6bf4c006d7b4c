"""What the handle sends, and what it refuses to send."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from penstock.cluster.client_calls import (
    OPTION_NAMES,
    detokenize_call,
    embed_calls,
    generate_call,
    score_call,
    tokenize_call,
)
from penstock.cluster.ingress.known_fields import KNOWN
from penstock.cluster.ingress.openapi_bodies import Kind
from penstock.workers.errors import RequestError

CHAT: Any = [{"role": "user", "content": "hello"}]


def test_every_option_is_a_field_of_the_api() -> None:
    assert OPTION_NAMES - {"request_id"} <= KNOWN[Kind.COMPLETION] | KNOWN[Kind.CHAT]


def test_options_arrive_under_their_names() -> None:
    options: Any = {"presence_penalty": 0.5, "logit_bias": {3: 1.0}, "bad_words": ["x"], "min_tokens": 2, "best_of": 4}
    call = generate_call("hi", {**options, "request_id": "mine"})
    assert call.path == "/v1/completions"
    assert call.headers == {"x-request-id": "mine"}
    sent = json.loads(call.content())
    assert sent.pop("logit_bias") == {"3": 1.0}
    assert {name: sent[name] for name in options if name != "logit_bias"} == {
        name: value for name, value in options.items() if name != "logit_bias"
    }
    chat = generate_call(CHAT, {"logprobs": 3})
    assert chat.path == "/v1/chat/completions"
    assert (chat.body["logprobs"], chat.body["top_logprobs"]) == (True, 3)


def test_a_mistyped_option_is_told_with_the_nearest() -> None:
    with pytest.raises(RequestError, match="did you mean 'temperature'") as wrong:
        generate_call("x", {"temprature": 0.5})  # type: ignore[typeddict-unknown-key]
    assert wrong.value.field == "temprature"


def test_token_ids_may_be_numpys() -> None:
    sent = json.loads(generate_call(np.array([1, 2, 3]), {}).content())  # type: ignore[arg-type]
    assert sent["prompt"] == [1, 2, 3]
    assert json.loads(detokenize_call(np.array([4], np.int32), None).content()) == {"tokens": [4]}  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), b"x", {1, 2}, object()])
def test_what_json_cannot_say_is_refused_here(value: Any) -> None:
    with pytest.raises(RequestError) as refused:
        generate_call("x", {"temperature": value}).content()
    assert refused.value.code == "invalid_json"


def test_a_lone_surrogate_is_refused_here() -> None:
    with pytest.raises(RequestError, match="cannot be sent"):
        generate_call("\ud800", {}).content()


def test_the_other_calls() -> None:
    score = json.loads(score_call("hi", 2, None).content())
    assert (score["echo"], score["max_tokens"], score["prompt_logprobs"]) == (True, 0, 2)
    assert score_call(CHAT, 0, "m").body["max_tokens"] == 1
    many = embed_calls([f"text {i}" for i in range(300)], "m")
    assert [len(call.body["input"]) for call in many] == [128, 128, 44]
    with pytest.raises(RequestError, match="list of texts"):
        embed_calls("one text", None)
    with pytest.raises(RequestError, match="list of texts"):
        embed_calls([1, 2, 3], None)  # type: ignore[arg-type]
    assert tokenize_call("hi", False, None).body == {"prompt": "hi", "add_special_tokens": False}
    assert "messages" in tokenize_call(CHAT, True, None).body
