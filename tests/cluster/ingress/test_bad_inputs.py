"""Every kind of bad request gets its typed answer over HTTP and through the handle; streams beside it notice nothing.

One server over real oracle workers and one canary for the whole file: the canary streams without pause, and every
token of it is checked against what the oracle must say. `fakes/bad_requests.py` holds the table.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from fakes.bad_requests import BAD_REQUESTS, PATHS, UNSAYABLE, BadRequest
from fakes.http_server import HttpServer
from fakes.oracle_app import Canary, OracleApp

from penstock.cluster.client import Handle, connect
from penstock.cluster.settings import LimitSettings
from penstock.cluster.text import TextCodec
from penstock.workers.errors import RequestError

pytestmark = pytest.mark.timeout(60)
KEY = "k-123"
COMPLETIONS, CHAT = PATHS["completions"], PATHS["chat"]
PROMPTED = {"completions", "chat"}
JSON = {"content-type": "application/json", "authorization": f"Bearer {KEY}"}
NOT_BY_HANDLE = {"stream", "stream_options"}  # the handle sets them itself
LOGPROBS = {"logprobs", "top_logprobs"}  # one option of the handle
# What a list of token ids, or of messages, is to the handle: it cannot say that it means something else.
OTHER_MEANING = {"object", "a string", "an object", "a message is a string"}


@pytest.fixture(scope="module")
def app(codec: TextCodec) -> OracleApp:
    return OracleApp(codec, api_key=KEY, limits=LimitSettings(max_body_bytes=8_000_000))


@pytest.fixture(scope="module")
def server(app: OracleApp) -> Iterator[HttpServer]:
    with HttpServer(app, graceful=True) as running:
        yield running


@pytest.fixture(scope="module")
def canary(server: HttpServer) -> Iterator[Canary]:
    thread = Canary(server.url, KEY)
    thread.start()
    thread.sang()
    yield thread
    if thread.is_alive():
        thread.sang()
    thread.end()


@pytest.fixture(scope="module")
def client(server: HttpServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, headers=JSON, timeout=20, trust_env=False) as found:
        yield found


@pytest.fixture(scope="module")
def handle(server: HttpServer) -> Iterator[Handle]:
    with connect(server.url, KEY) as found:
        yield found


def error_of(body: bytes) -> dict[str, Any]:
    error: dict[str, Any] = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert len(error["message"]) < 500
    return error


def test_the_table_holds_every_row() -> None:
    """Rows of the lists 7.2 to 7.4 that a request's fields can say. The others are about transport (its own file),
    about meaning (`test_accepted`, `test_choice_text.py`), or about parts that do not exist: adapters, state."""
    listed = {row.row for row in BAD_REQUESTS + UNSAYABLE}
    fields = {26, 27, 28, 29, 31, 32, 33, 34, 36, 37, 38, 39, 41, 43, 44, 46, 48, 49, 51, 52, 54, 57, 58, 59, 61, 63}
    assert fields | {22, 53, 64, 66, 67, 68, 69, 71, 72, 74, 77, 78, 81, 82, 83, 84, 88} <= listed
    assert len({row.id for row in BAD_REQUESTS}) == len(BAD_REQUESTS)


@pytest.mark.parametrize("row", BAD_REQUESTS, ids=lambda row: row.id)
def test_over_http(client: httpx.Client, canary: Canary, row: BadRequest) -> None:
    answer = client.post(PATHS[row.api], content=json.dumps(row.body()).encode())
    error = error_of(answer.content)
    assert (answer.status_code, error["param"]) == (row.status, row.param)
    assert error["type"] == ("not_found_error" if row.status == 404 else "invalid_request_error")
    canary.check()


@pytest.mark.parametrize("row", [r for r in BAD_REQUESTS + UNSAYABLE if r.api in PROMPTED], ids=lambda r: r.id)
def test_through_the_handle(handle: Handle, canary: Canary, row: BadRequest) -> None:
    body: Any = {name: value for name, value in row.body().items() if not (row.api == "chat" and name in LOGPROBS)}
    prompt = body.pop("prompt" if row.api == "completions" else "messages", None)
    if (
        prompt is None
        or NOT_BY_HANDLE & body.keys()
        or row.name in OTHER_MEANING
        or not row.fields.keys() & {*body, "prompt", "messages"}
    ):
        pytest.skip("the handle cannot say this")
    with pytest.raises(RequestError) as wrong:
        handle.generate(prompt, **body)
    assert len(str(wrong.value)) < 700
    assert wrong.value.field in {row.param, "prompt", *row.fields}  # by its own name for it
    canary.check()


ACCEPTED: list[tuple[str, dict[str, Any]]] = [
    ("7: NUL byte", {"user": "a\0b", "stop": "\0"}),
    ("38: one token is left", {"prompt": [1] * 511, "messages": None, "max_tokens": None}),
    ("42: temperature 1e-9 is greedy", {"temperature": 1e-9}),
    ("42: temperature 1e-300", {"temperature": 1e-300}),
    ("43: top_k 10^9 is all", {"top_k": 10**9}),
    ("43: top_k 0 and -1 are all", {"top_k": -1}),
    ("54: negative seed wraps", {"seed": -1}),
    ("56: unknown fields", {"something_new": {"a": [1]}, "stream_interval": 3}),
    (
        "56: what clients send",
        {"repetition_penalty": 1.0, "stop": None, "logit_bias": {}, "presence_penalty": 0, "user": "u"},
    ),
    ("58: priority is ignored", {"priority": 9}),
    ("62: ignore_eos without a bound", {"ignore_eos": True, "max_tokens": None}),
    ("61: min_tokens as many as may come", {"min_tokens": 4, "max_tokens": 4}),
    ("63: one token allowed", {"allowed_token_ids": [5]}),
    ("26: no model", {"model": None}),
    ("6: surrogate pair", {"user": "\U0001f600"}),
    ("79: special tokens as text", {"user": "<|im_end|>", "stop": "<|im_start|>"}),
    ("49: penalties, biases and bans", {"frequency_penalty": 2, "logit_bias": {"5": -100}, "bad_words": ["fox"]}),
]


@pytest.mark.parametrize("fields", [row[1] for row in ACCEPTED], ids=[row[0] for row in ACCEPTED])
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_accepted(client: httpx.Client, canary: Canary, path: str, fields: dict[str, Any]) -> None:
    plain: dict[str, Any] = {"model": "tiny", "max_tokens": 4}
    plain |= {"prompt": "x"} if path == COMPLETIONS else {"messages": [{"role": "user", "content": "x<|im_end|>\0"}]}
    ours = fields if path == COMPLETIONS else {k: v for k, v in fields.items() if k not in {"prompt", "messages"}}
    answer = client.post(path, json={**plain, **ours})
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["finish_reason"] in {"length", "stop"}
    canary.check()


def test_context_overflow_is_recognisable(client: httpx.Client) -> None:
    error = error_of(client.post(COMPLETIONS, json={"prompt": [1] * 600}).content)
    assert error["code"] == "context_length_exceeded"
    assert "maximum context length" in error["message"]
    assert "600" in error["message"]
    assert "512" in error["message"]


def test_text_is_bounded_before_it_is_tokenised(client: httpx.Client, canary: Canary) -> None:
    """7 MB without a space are refused in the time it takes to read them, and the canary does not pause."""
    for path, body in (
        (COMPLETIONS, {"prompt": "a" * 7_000_000}),
        (CHAT, {"messages": [{"role": "user", "content": "a" * 7_000_000}]}),
        ("/v1/embeddings", {"input": "a" * 7_000_000}),
        ("/tokenize", {"prompt": "a" * 7_000_000}),
    ):
        began = time.monotonic()
        answer = client.post(path, json=body)
        assert answer.status_code == 400
        assert time.monotonic() - began < 3
    canary.sang()


def test_many_unknown_models_and_fields_leave_no_trace(client: httpx.Client, canary: Canary) -> None:
    for number in range(300):
        answer = client.post(COMPLETIONS, json={"model": f"../../etc/{number}", "prompt": "x"})
        assert answer.json()["error"]["code"] == "model_not_found"
        field = {f"odd_{number}": 1, "prompt": "x", "max_tokens": 1}
        assert client.post(COMPLETIONS, json=field).status_code == 200
    page = client.get("/metrics").text
    assert "etc" not in page
    assert "odd_" not in page
    canary.sang()


def test_nothing_is_left_after_all_that(app: OracleApp, canary: Canary) -> None:
    """Last: with the canary gone, the workers hold no sequence and no block."""
    canary.sang()
    canary.end()
    deadline = time.monotonic() + 10
    while not app.idle and time.monotonic() < deadline:
        time.sleep(0.01)
    assert app.idle
