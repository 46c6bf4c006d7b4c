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
        generate_call("x", {"max_tokens": 3, "temperature": value}).content()
    assert refused.value.field == "temperature"
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


NO_LIST: list[Any] = [None, 5, 1.5, True, b"abc", bytearray(b"a"), {"role": "user"}, {5, 6}, object()]


@pytest.mark.parametrize("odd", [*NO_LIST, ["a", "b"], [[1], [2]]])
def test_what_is_no_prompt_is_refused_here(odd: Any) -> None:
    """Bytes would pass for token ids, an object for the list of its names."""
    for ask in (
        lambda: generate_call(odd, {}),
        lambda: generate_call(odd, {}, stream=True),
        lambda: score_call(odd, 0, None),
        lambda: tokenize_call(odd, True, None),
    ):
        with pytest.raises(RequestError) as refused:
            ask()
        assert refused.value.field == "prompt"


@pytest.mark.parametrize("odd", [*NO_LIST, "text"])
def test_what_is_no_list_is_refused_here(odd: Any) -> None:
    with pytest.raises(RequestError):
        embed_calls(odd, None)
    with pytest.raises(RequestError):
        embed_calls([odd] if odd != "text" else [5], None)
    with pytest.raises(RequestError):
        detokenize_call(odd, None)


@pytest.mark.parametrize("request_id", ["", "a\nb", "é", "\ud800", "x" * 129, " ", 5, b"x"])
def test_request_ids_that_no_header_can_hold(request_id: Any) -> None:
    with pytest.raises(RequestError) as refused:
        generate_call("x", {"request_id": request_id})
    assert refused.value.field == "request_id"


def test_options_of_the_other_kind_of_prompt() -> None:
    for prompt, name, value in (("x", "chat_template_kwargs", {"a": 1}), (CHAT, "best_of", 2), (CHAT, "echo", True)):
        with pytest.raises(RequestError) as refused:
            generate_call(prompt, {name: value})  # type: ignore[misc]
        assert refused.value.field == name
        generate_call(prompt, {name: None})  # type: ignore[misc]
