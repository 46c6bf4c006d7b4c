"""Structured output over HTTP with the embedded model: what comes back is what was asked for, or a 400 says why not."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import jsonschema
import pytest
from fakes.embedded_app import EmbeddedApp
from fakes.http_server import HttpServer
from openai import OpenAI

from penstock.cluster.client import connect
from penstock.cluster.ingress.fields import Fields
from penstock.cluster.ingress.grammar_fields import read_grammar
from penstock.cluster.text import TextCodec
from penstock.workers.errors import RequestError
from penstock.workers.grammar_spec import GrammarKind, GrammarSpec

pytestmark = pytest.mark.timeout(90)
RECORD = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 10},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "city": {"enum": ["Rome", "Oslo"]},
    },
    "required": ["name", "age", "city"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "record", "schema": RECORD, "strict": True}}
CHAT = {"messages": [{"role": "user", "content": "Tell me a story about a fox."}], "max_tokens": 120}
TEXT = {"prompt": "Tell me a story about a fox.", "max_tokens": 120, "temperature": 0}


@pytest.fixture(scope="module")
def codec(embedded: TextCodec) -> TextCodec:
    return embedded


@pytest.fixture(scope="module")
def client(server: HttpServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60, trust_env=False) as found:
        yield found


def texts(client: httpx.Client, body: dict[str, Any]) -> list[str]:
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    choices = answer.json()["choices"]
    assert {choice["finish_reason"] for choice in choices} == {"stop"}
    return [choice["message"]["content"] if "messages" in body else choice["text"] for choice in choices]


def test_a_schema_in_chat_with_several_choices(client: httpx.Client) -> None:
    found = texts(client, {**CHAT, "response_format": FORMAT, "n": 4, "temperature": 1.3, "seed": 3})
    for text in found:
        jsonschema.validate(json.loads(text), RECORD)
    assert len(set(found)) > 1


def test_openais_client_streams_the_same(server: HttpServer, client: httpx.Client) -> None:
    whole = texts(client, {**CHAT, "response_format": FORMAT, "temperature": 0})
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", http_client=httpx.Client(trust_env=False)) as openai:
        stream = openai.chat.completions.create(
            model="tiny", stream=True, temperature=0, response_format=FORMAT, **CHAT
        )
        assert "".join(part.choices[0].delta.content or "" for part in stream) == whole[0]


@pytest.mark.parametrize(
    ("asked", "pattern"),
    [
        ({"structured_outputs": {"regex": "[0-9]{2}-[a-f]{3}"}}, "[0-9]{2}-[a-f]{3}"),
        ({"structured_outputs": {"choice": ["é 1", 'say "no"']}}, 'é 1|say "no"'),
        ({"structured_outputs": {"grammar": 'start: "a" ("b" | "c")~3'}}, "a[bc]{3}"),
        ({"guided_grammar": 'root ::= "x" [0-9] tail\ntail ::= "y" | "z"'}, "x[0-9][yz]"),
        ({"guided_choice": ["yes"]}, "yes"),
        ({"guided_regex": "k{3}", "ignore_eos": True}, "k{3}"),
        ({"structured_outputs": {"regex": "q+w"}, "bad_words": ["q"], "stop": ["never"], "n": 2}, "q+w"),
        ({"structured_outputs": {"regex": "ab"}, "min_tokens": 30}, "ab"),
        ({"structured_outputs": {"regex": "[ab]{4}"}, "allowed_token_ids": [700]}, "[ab]{4}"),
        ({"structured_outputs": {"json": json.dumps(RECORD)}}, r"(?s)\s*\{.*\}"),
        ({"structured_outputs": {"json": {"type": "integer", "minimum": 10, "maximum": 19}}}, r"1\d"),
    ],
)
def test_every_form(client: httpx.Client, asked: dict[str, Any], pattern: str) -> None:
    for text in texts(client, {**TEXT, **asked}):
        assert re.fullmatch(pattern, text)


def test_any_object_of_bounded_length(client: httpx.Client) -> None:
    """A small model need not come to the end; what there is begins as an object does."""
    body = {**CHAT, "response_format": {"type": "json_object"}, "temperature": 0}
    choice = client.post("/v1/chat/completions", json=body).json()["choices"][0]
    assert choice["message"]["content"].startswith("{")
    if choice["finish_reason"] == "stop":
        assert isinstance(json.loads(choice["message"]["content"]), dict)


def test_the_handle(server: HttpServer) -> None:
    with connect(server.url) as penstock:
        answer = penstock.generate("Hello", max_tokens=40, structured_outputs={"regex": "[a-z]{4}!"})
        assert re.fullmatch("[a-z]{4}!", answer.text)
        with pytest.raises(RequestError, match="unclosed"):
            penstock.generate("Hello", structured_outputs={"regex": "["})


@pytest.mark.parametrize(
    ("asked", "field", "says"),
    [
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": 5}}}},
            "response_format",
            "type",
        ),
        ({"structured_outputs": {"json": {"$ref": "file:///etc/passwd"}}}, "structured_outputs", "does not fetch"),
        ({"guided_json": {"not": {}}}, "guided_json", "Unimplemented"),
        ({"structured_outputs": {"grammar": "start: nobody"}}, "structured_outputs", "nobody"),
        ({"structured_outputs": {"grammar": "start: start"}}, "structured_outputs", "leads nowhere"),
    ],
)
def test_what_cannot_be_followed_is_a_400(
    client: httpx.Client, app: EmbeddedApp, asked: dict[str, Any], field: str, says: str
) -> None:
    for _ in range(2):  # the second time the verdict is known
        answer = client.post("/v1/completions", json={**TEXT, **asked})
        error = answer.json()["error"]
        assert (answer.status_code, error["param"], error["code"]) == (400, field, "invalid_grammar")
        assert says in error["message"]
    assert app.idle
    page = client.get("/metrics").text
    for verdict in ("refused", "known"):
        (count,) = re.findall(rf'^penstock_grammar_checks_total{{.*verdict="{verdict}".*}} (\S+)$', page, re.MULTILINE)
        assert float(count) > 0


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": 5}}}, "response_format"),
        ({"response_format": {"type": "structural_tag"}}, "response_format"),
        ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "guided_regex"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs"),
        ({"structured_outputs": {"choice": [""]}}, "structured_outputs"),
        ({"structured_outputs": {"regex": 5}}, "structured_outputs"),
        (
            {"structured_outputs": {"regex": "a", "disable_any_whitespace": True}},
            "structured_outputs.disable_any_whitespace",
        ),
        ({"structured_outputs": {"regex": "a" * 70_000}}, "structured_outputs"),
        ({"guided_choice": "yes"}, "guided_choice"),
    ],
)
def test_forms_that_are_none(codec: TextCodec, body: dict[str, Any], field: str) -> None:
    with pytest.raises(RequestError) as caught:
        read_grammar(Fields(body), codec)
    assert caught.value.field == field


def test_what_asks_for_nothing_and_what_cannot_be_asked(codec: TextCodec) -> None:
    assert read_grammar(Fields({"response_format": {"type": "text"}}), codec) is None
    found = read_grammar(Fields({"response_format": {"type": "text"}, "guided_regex": "a"}), codec)
    assert found == GrammarSpec(GrammarKind.REGEX, "a", codec.eos_token_ids)
    for bare in (TextCodec(100, (1,)), TextCodec(100, ())):
        with pytest.raises(RequestError):
            read_grammar(Fields({"guided_regex": "a"}), bare)
