"""Messages become the bodies that mean the same over HTTP."""

from __future__ import annotations

import math

import pytest

from penstock.cluster.grpc_front import request_bodies as bodies
from penstock.cluster.grpc_front.penstock_pb2 import (
    ChatMessage,
    Conversation,
    EmbedRequest,
    GenerateRequest,
    Output,
    Prompt,
    Sampling,
    StructuredOutputs,
    TokenIds,
    TokenizeRequest,
)
from penstock.cluster.ingress.known_fields import KNOWN
from penstock.cluster.ingress.openapi_bodies import Kind
from penstock.workers.errors import RequestError

CHAT = Prompt(chat=Conversation(messages=[ChatMessage(role="user", content="hi"), ChatMessage(role="assistant")]))
SAMPLING = Sampling(
    max_tokens=0,
    temperature=0.7,
    top_p=0.9,
    top_k=-1,
    min_p=0.1,
    seed=-5,
    presence_penalty=1.5,
    frequency_penalty=-1.5,
    repetition_penalty=1.1,
    logit_bias={3: -100.0, 7: 2.5},
    bad_words=["no"],
    allowed_token_ids=TokenIds(ids=[1, 2]),
    min_tokens=2,
    stop=["a", "b"],
    stop_token_ids=[9],
    ignore_eos=True,
    n=2,
    best_of=3,
    structured_outputs=StructuredOutputs(choice=["yes", "no"]),
)


@pytest.mark.parametrize(
    ("stated", "body"),
    [
        (StructuredOutputs(json="{}"), {"json": "{}"}),
        (StructuredOutputs(regex="a"), {"regex": "a"}),
        (StructuredOutputs(choice=["a"]), {"choice": ["a"]}),
        (StructuredOutputs(grammar='start: "a"'), {"grammar": 'start: "a"'}),
        (StructuredOutputs(json_object=True), {"json_object": True}),
    ],
)
def test_structured_outputs(stated: StructuredOutputs, body: dict[str, object]) -> None:
    asked = GenerateRequest(prompt=Prompt(text="x"), sampling=Sampling(structured_outputs=stated))
    assert bodies.generate_body(asked, stream=False)[0]["structured_outputs"] == body


def test_every_sampling_field_arrives_under_its_http_name() -> None:
    body, chat = bodies.generate_body(GenerateRequest(prompt=Prompt(text="x"), sampling=SAMPLING), stream=False)
    assert not chat
    assert body == {
        "prompt": "x",
        "max_tokens": 0,
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": -1,
        "min_p": 0.1,
        "seed": -5,
        "presence_penalty": 1.5,
        "frequency_penalty": -1.5,
        "repetition_penalty": 1.1,
        "logit_bias": {"3": -100.0, "7": 2.5},
        "bad_words": ["no"],
        "allowed_token_ids": [1, 2],
        "min_tokens": 2,
        "stop": ["a", "b"],
        "stop_token_ids": [9],
        "ignore_eos": True,
        "n": 2,
        "best_of": 3,
        "structured_outputs": {"choice": ["yes", "no"]},
    }


def test_no_field_has_a_name_that_http_does_not_know() -> None:
    known = KNOWN[Kind.COMPLETION] | KNOWN[Kind.CHAT]
    names = {f.name for message in (Sampling, Output, GenerateRequest) for f in message.DESCRIPTOR.fields}
    assert names - known == {"sampling", "output", "return_prompt_token_ids"}


def test_absent_fields_stay_absent() -> None:
    body, _ = bodies.generate_body(GenerateRequest(prompt=Prompt(tokens=TokenIds(ids=[5, 6]))), stream=True)
    assert body == {"prompt": [5, 6], "stream": True, "stream_options": {"include_usage": True}}


def test_a_conversation_becomes_a_chat_request() -> None:
    request = GenerateRequest(prompt=CHAT, output=Output(logprobs=2, prompt_logprobs=1), cache_salt="s", model="m")
    request.prompt.chat.add_generation_prompt = False
    values = request.prompt.chat.chat_template_kwargs
    values["depth"].number_value = 3
    values["share"].number_value = 0.5
    values["loud"].bool_value = True
    values["tone"].string_value = "dry"
    body, chat = bodies.generate_body(request, stream=False)
    assert chat
    assert body == {
        "model": "m",
        "cache_salt": "s",
        "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": ""}],
        "logprobs": True,
        "top_logprobs": 2,
        "prompt_logprobs": 1,
        "add_generation_prompt": False,
        "chat_template_kwargs": {"depth": 3, "share": 0.5, "loud": True, "tone": "dry"},
    }
    assert isinstance(body["chat_template_kwargs"]["depth"], int)


def test_embeddings_and_tokens() -> None:
    embed = EmbedRequest(inputs=[Prompt(text="a"), Prompt(text="b")])
    assert bodies.embed_body(embed) == {"input": ["a", "b"]}
    tokenize = TokenizeRequest(prompt=CHAT, add_special_tokens=False)
    assert bodies.tokenize_body(tokenize)["messages"][0]["content"] == "hi"
    assert bodies.tokenize_body(TokenizeRequest(prompt=Prompt(text=""))) == {"prompt": ""}


def test_what_has_no_body_is_refused_by_field() -> None:
    with pytest.raises(RequestError) as missing:
        bodies.generate_body(GenerateRequest(), stream=False)
    assert missing.value.field == "prompt"
    with pytest.raises(RequestError, match="texts or token ids"):
        bodies.embed_body(EmbedRequest(inputs=[CHAT]))
    with pytest.raises(RequestError) as second:
        bodies.embed_body(EmbedRequest(inputs=[Prompt(text="a"), Prompt()]))
    assert second.value.field == "inputs[1]"
    with pytest.raises(RequestError, match="text or a conversation"):
        bodies.tokenize_body(TokenizeRequest(prompt=Prompt(tokens=TokenIds(ids=[1]))))


def test_odd_template_variables_reach_the_parser_as_they_are() -> None:
    """JSON has no word for some of them; the parser refuses those by name."""
    request = GenerateRequest(prompt=CHAT)
    values = request.prompt.chat.chat_template_kwargs
    values["nan"].number_value = math.nan
    values["huge"].number_value = -math.inf
    values["list"].list_value.extend([1, [2]])
    values["object"].struct_value["a"] = "b"
    values["null"].null_value = 0
    values["unset"].SetInParent()
    found = bodies.generate_body(request, stream=False)[0]["chat_template_kwargs"]
    assert math.isnan(found.pop("nan"))
    assert found == {"huge": -math.inf, "list": [], "object": {}, "null": None, "unset": None}
