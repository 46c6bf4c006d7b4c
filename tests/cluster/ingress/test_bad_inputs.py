"""Every kind of bad request gets its typed answer, and streams that run beside it notice nothing.

One server and one canary thread for the whole file: the canary streams without pause and checks every text.
"""

from __future__ import annotations

import gzip
import json
import math
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

import httpx
import pytest
from fakes.fake_generator import FakeFleet, FakeGenerator, Step, deltas
from fakes.http_server import HttpServer
from fakes.tiny_model import CONTEXT

from penstock.cluster.client import connect
from penstock.cluster.ingress.app import build_app
from penstock.cluster.ingress.settings import IngressSettings
from penstock.cluster.metrics import Metrics
from penstock.cluster.settings import LimitSettings
from penstock.cluster.text import TextCodec
from penstock.workers.protocol import GenerateRequest

pytestmark = pytest.mark.timeout(60)
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
KEY = "k-123"
CANARY = tuple(range(40, 50))
JSON = {"content-type": "application/json", "authorization": f"Bearer {KEY}"}


class Canary(threading.Thread):
    """Streams over and over; `rounds` counts the perfect ones."""

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        self.rounds = 0
        self.faults: list[str] = []
        self.leave = threading.Event()
        self._handle = connect(url, KEY)

    def run(self) -> None:
        while not self.leave.is_set():
            try:
                tokens = [t for chunk in self._handle.stream(CANARY, max_tokens=10) for t in chunk.token_ids]
            except Exception as error:  # noqa: BLE001 - whatever happens to the canary is a finding
                self.faults.append(repr(error))
                continue
            if tokens != list(CANARY):
                self.faults.append(f"wrong tokens {tokens}")
            self.rounds += 1
        self._handle.close()

    def sang(self) -> None:
        """Assert that the canary is well and comes through another whole round."""
        goal, deadline = self.rounds + 1, time.monotonic() + 10
        while self.rounds < goal and not self.faults and time.monotonic() < deadline:
            time.sleep(0.002)
        assert not self.faults
        assert self.rounds >= goal


def script(request: GenerateRequest) -> list[Step]:
    if request.prompt != CANARY:
        return deltas([5, 6, 7])
    steps: list[Step] = []
    for step in deltas(CANARY):
        steps += [0.0005, step]
    return steps


@pytest.fixture(scope="module")
def limits() -> LimitSettings:
    return LimitSettings(max_body_bytes=2_000_000, body_timeout_s=0.5, write_timeout_s=2.0)


@pytest.fixture(scope="module")
def server(codec: TextCodec, limits: LimitSettings) -> Iterator[HttpServer]:
    settings = IngressSettings(("tiny",), CONTEXT, api_key=KEY, limits=limits)
    with HttpServer(build_app(settings, codec, FakeGenerator(script), Metrics(), FakeFleet())) as running:
        yield running


@pytest.fixture(scope="module")
def canary(server: HttpServer) -> Iterator[Canary]:
    thread = Canary(server.url)
    thread.start()
    yield thread
    thread.leave.set()
    thread.join(10)


def error_of(body: bytes) -> dict[str, Any]:
    error: dict[str, Any] = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return error


LONG = "a" * 300_000
DEEP = "[" * 100_000
TRANSPORT: list[tuple[str, bytes, dict[str, str], int]] = [
    ("empty body", b"", {}, 400),
    ("not JSON", b"prompt=x", {}, 400),
    ("array at top", b"[1]", {}, 400),
    ("number at top", b"7", {}, 400),
    ("null at top", b"null", {}, 400),
    ("deep nesting", b'{"prompt":' + DEEP.encode(), {}, 400),
    ("deep nesting, closed", b'{"prompt":' + DEEP.encode() + b"]" * 100_000 + b"}", {}, 400),
    ("invalid UTF-8", b'{"prompt":"\xff\xfe"}', {}, 400),
    ("lone surrogate", b'{"prompt":"\\ud800"}', {}, 400),
    ("lone surrogate in a key", b'{"prompt":"x","\\udfff":1}', {}, 400),
    ("NaN", b'{"prompt":"x","temperature":NaN}', {}, 400),
    ("Infinity", b'{"prompt":"x","top_p":-Infinity}', {}, 400),
    ("number of 5,000 digits", b'{"prompt":"x","seed":' + b"9" * 5000 + b"}", {}, 400),
    ("too large", b'{"prompt":"' + b"x" * 2_100_000 + b'"}', {}, 413),
    ("gzip", gzip.compress(b'{"prompt":"x"}'), {"content-encoding": "gzip"}, 415),
    ("text/plain", b'{"prompt":"x"}', {"content-type": "text/plain"}, 415),
    ("form", b"prompt=x", {"content-type": "application/x-www-form-urlencoded"}, 415),
    ("no key", b'{"prompt":"x"}', {"authorization": ""}, 401),
    ("wrong key", b'{"prompt":"x"}', {"authorization": "Bearer nope"}, 401),
    ("lower-case scheme", b'{"prompt":"x"}', {"authorization": f"bearer {KEY}"}, 401),
    ("one header of 100 kB", b'{"prompt":"x"}', {"x-big": "y" * 100_000}, 431),
    ("300 headers", b'{"prompt":"x"}', {f"x-{i}": "y" for i in range(300)}, 431),
]


@pytest.mark.parametrize(("body", "headers", "status"), [row[1:] for row in TRANSPORT], ids=[r[0] for r in TRANSPORT])
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_transport(
    server: HttpServer, canary: Canary, path: str, body: bytes, headers: dict[str, str], status: int
) -> None:
    answered, found, answer = server.request("POST", path, body, {**JSON, **headers})
    assert answered == status
    assert found["content-type"] == "application/json"
    error_of(answer)
    canary.sang()


COMPLETION_FIELDS: list[tuple[str, dict[str, Any], str | None]] = [
    ("no prompt", {"prompt": None}, "prompt"),
    ("empty prompt", {"prompt": ""}, "prompt"),
    ("empty list", {"prompt": []}, "prompt"),
    ("empty inner list", {"prompt": [[]]}, "prompt"),
    ("prompt object", {"prompt": {"a": 1}}, "prompt"),
    ("negative id", {"prompt": [1, -1]}, "prompt"),
    ("id at vocabulary size", {"prompt": [400]}, "prompt"),
    ("id 2^63", {"prompt": [2**63]}, "prompt"),
    ("bool ids", {"prompt": [True, False]}, "prompt"),
    ("float ids", {"prompt": [1.0]}, "prompt"),
    ("mixed list", {"prompt": ["a", 1]}, "prompt"),
    ("mixed inner lists", {"prompt": [[1], "a"]}, "prompt"),
    ("too many prompts", {"prompt": ["a"] * 129}, "prompt"),
    ("too many choices", {"prompt": ["a"] * 100, "n": 2}, "prompt"),
    ("longer than the context", {"prompt": [1] * (CONTEXT + 1)}, "prompt"),
    ("exactly the context", {"prompt": [1] * CONTEXT}, "prompt"),
    ("prompt and max_tokens too long", {"prompt": [1] * 500, "max_tokens": 13}, "prompt"),
    ("text that cannot fit", {"prompt": LONG}, "prompt"),
    ("echo", {"echo": True}, "echo"),
    ("suffix", {"suffix": "x"}, "suffix"),
    ("best_of", {"best_of": 3}, "best_of"),
    ("logprobs -1", {"logprobs": -1}, "logprobs"),
    ("logprobs 21", {"logprobs": 21}, "logprobs"),
    ("logprobs 10^6", {"logprobs": 10**6}, "logprobs"),
    ("logprobs bool", {"logprobs": True}, "logprobs"),
]
CHAT_FIELDS: list[tuple[str, dict[str, Any], str | None]] = [
    ("no messages", {"messages": None}, "messages"),
    ("empty messages", {"messages": []}, "messages"),
    ("messages a string", {"messages": "hi"}, "messages"),
    ("message a string", {"messages": ["hi"]}, "messages[0]"),
    ("no role", {"messages": [{"content": "x"}]}, "messages[0].role"),
    ("unknown role", {"messages": [{"role": "wizard", "content": "x"}]}, "messages"),
    ("no content", {"messages": [{"role": "user"}]}, "messages[0].content"),
    ("content a number", {"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    (
        "image part",
        {
            "messages": [
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}
            ]
        },
        "messages[0].content[0].type",
    ),
    ("part a string", {"messages": [{"role": "user", "content": ["x"]}]}, "messages[0].content[0]"),
    (
        "part without text",
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        "messages[0].content[0].text",
    ),
    ("too long", {"messages": [{"role": "user", "content": "word " * 600}]}, "messages"),
    ("text that cannot fit", {"messages": [{"role": "user", "content": LONG}]}, "messages"),
    ("5,000 messages", {"messages": [{"role": "user", "content": "x"}] * 5000}, "messages"),
    ("top_logprobs alone", {"top_logprobs": 3}, "top_logprobs"),
    ("top_logprobs 21", {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ("logprobs a number", {"logprobs": 3}, "logprobs"),
    ("tools", {"tools": [{"type": "function"}]}, "tools"),
    ("tool_choice", {"tool_choice": "required"}, "tool_choice"),
    ("template", {"chat_template": "{{ 1 }}"}, "chat_template"),
    ("template variables: reserved", {"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
    ("template variables: tokenize", {"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs"),
    ("template variables: nested", {"chat_template_kwargs": {"a": {"b": 1}}}, "chat_template_kwargs.a"),
    ("template variables: no name", {"chat_template_kwargs": {"a-b": 1}}, "chat_template_kwargs"),
    ("max_completion_tokens 0", {"max_completion_tokens": 0}, "max_completion_tokens"),
]
SHARED_FIELDS: list[tuple[str, dict[str, Any], str | None]] = [
    ("model a number", {"model": 5}, "model"),
    ("max_tokens 0", {"max_tokens": 0}, "max_tokens"),
    ("max_tokens negative", {"max_tokens": -1}, "max_tokens"),
    ("max_tokens a string", {"max_tokens": "9"}, "max_tokens"),
    ("max_tokens a float", {"max_tokens": 9.5}, "max_tokens"),
    ("temperature -1", {"temperature": -1}, "temperature"),
    ("temperature 1e308", {"temperature": 1e308}, "temperature"),
    ("temperature a string", {"temperature": "hot"}, "temperature"),
    ("temperature bool", {"temperature": True}, "temperature"),
    ("top_p 0", {"top_p": 0}, "top_p"),
    ("top_p -0.1", {"top_p": -0.1}, "top_p"),
    ("top_p 1.1", {"top_p": 1.1}, "top_p"),
    ("top_k -2", {"top_k": -2}, "top_k"),
    ("top_k 10^12", {"top_k": 10**12}, "top_k"),
    ("min_p 2", {"min_p": 2}, "min_p"),
    ("n 0", {"n": 0}, "n"),
    ("n 10^6", {"n": 10**6}, "n"),
    ("seed a string", {"seed": "7"}, "seed"),
    ("seed 2^64", {"seed": 2**64}, "seed"),
    ("presence_penalty 3", {"presence_penalty": 3}, "presence_penalty"),
    ("frequency_penalty 1", {"frequency_penalty": 1}, "frequency_penalty"),
    ("repetition_penalty 0", {"repetition_penalty": 0}, "repetition_penalty"),
    ("logit_bias", {"logit_bias": {"5": -100}}, "logit_bias"),
    ("min_tokens", {"min_tokens": 5}, "min_tokens"),
    ("allowed_token_ids", {"allowed_token_ids": []}, "allowed_token_ids"),
    ("bad_words", {"bad_words": ["x"]}, "bad_words"),
    ("prompt_logprobs", {"prompt_logprobs": 1}, "prompt_logprobs"),
    ("kv_transfer_params", {"kv_transfer_params": {"peer": "10.0.0.1"}}, "kv_transfer_params"),
    ("json_object", {"response_format": {"type": "json_object"}}, "response_format"),
    ("response_format a string", {"response_format": "json"}, "response_format"),
    ("stop: 300,000 items", {"stop": ["x"] * 300_000}, "stop"),
    ("stop: empty string", {"stop": ""}, "stop"),
    ("stop: empty item", {"stop": ["a", ""]}, "stop"),
    ("stop: 1 MB", {"stop": "x" * 1_000_000}, "stop"),
    ("stop: number", {"stop": [5]}, "stop"),
    ("stop: object", {"stop": {"a": 1}}, "stop"),
    ("stop_token_ids out of range", {"stop_token_ids": [400]}, "stop_token_ids"),
    ("stop_token_ids: 10^5", {"stop_token_ids": [1] * 100_000}, "stop_token_ids"),
    ("stop_token_ids a number", {"stop_token_ids": 7}, "stop_token_ids"),
    ("stream a string", {"stream": "yes"}, "stream"),
    ("stream_options without stream", {"stream_options": {"include_usage": True}}, "stream_options"),
    ("stream_options a list", {"stream": True, "stream_options": []}, "stream_options"),
    (
        "include_usage a number",
        {"stream": True, "stream_options": {"include_usage": 1}},
        "stream_options.include_usage",
    ),
    ("user: 1 MB", {"user": "x" * 1_000_000}, "user"),
    ("metadata: 1 MB", {"metadata": {"a": "x" * 1_000_000}}, "metadata"),
    ("cache_salt: empty", {"cache_salt": ""}, "cache_salt"),
    ("cache_salt: slash", {"cache_salt": "../x"}, "cache_salt"),
    ("cache_salt: newline", {"cache_salt": "ab\n"}, "cache_salt"),
    ("cache_salt: long", {"cache_salt": "x" * 257}, "cache_salt"),
]
ROWS = (
    [(f"completions: {name}", COMPLETIONS, fields, param) for name, fields, param in COMPLETION_FIELDS + SHARED_FIELDS]
    + [(f"chat: {name}", CHAT, fields, param) for name, fields, param in CHAT_FIELDS + SHARED_FIELDS]
)  # fmt: skip


def body_for(path: str, fields: dict[str, Any]) -> dict[str, Any]:
    plain: dict[str, Any] = {"model": "tiny"}
    plain |= {"prompt": "x"} if path == COMPLETIONS else {"messages": [{"role": "user", "content": "x"}]}
    return {**plain, **fields}


@pytest.mark.parametrize(("path", "fields", "param"), [row[1:] for row in ROWS], ids=[row[0] for row in ROWS])
def test_fields(server: HttpServer, canary: Canary, path: str, fields: dict[str, Any], param: str | None) -> None:
    status, _, answer = server.request("POST", path, json.dumps(body_for(path, fields)).encode(), JSON)
    error = error_of(answer)
    assert status == 400
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert len(error["message"]) < 500
    canary.sang()


ACCEPTED: list[tuple[str, dict[str, Any]]] = [
    ("NUL byte", {"user": "a\0b"}),
    ("temperature 1e-9 is greedy", {"temperature": 1e-9}),
    ("top_k 10^9 is all", {"top_k": 10**9}),
    ("top_k -1 is all", {"top_k": -1}),
    ("negative seed wraps", {"seed": -1}),
    ("unknown fields", {"something_new": {"a": [1]}}),
    (
        "what clients send",
        {"repetition_penalty": 1.0, "stop": None, "logit_bias": {}, "presence_penalty": 0, "user": "u"},
    ),
    ("priority is ignored", {"priority": 9}),
    ("ignore_eos", {"ignore_eos": True}),
    ("no model", {"model": None}),
    ("surrogate pair", {"user": "\U0001f600"}),
    ("special tokens as text", {"user": "<|im_end|>"}),
]


@pytest.mark.parametrize("fields", [row[1] for row in ACCEPTED], ids=[row[0] for row in ACCEPTED])
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_accepted(server: HttpServer, canary: Canary, path: str, fields: dict[str, Any]) -> None:
    status, _, answer = server.request("POST", path, json.dumps(body_for(path, fields)).encode(), JSON)
    assert status == 200, answer
    assert json.loads(answer)["choices"][0]["finish_reason"] == "length"
    canary.sang()


def test_context_overflow_is_recognisable(server: HttpServer) -> None:
    body = json.dumps({"prompt": [1] * 600}).encode()
    error = error_of(server.request("POST", COMPLETIONS, body, JSON)[2])
    assert error["code"] == "context_length_exceeded"
    assert "maximum context length" in error["message"]
    assert "600" in error["message"]
    assert str(CONTEXT) in error["message"]


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/v1",
        "/v1/",
        "//v1/models",
        "/v1/models/",
        "/v1/../metrics",
        "/%2e%2e/v1/models",
        "/V1/models",
        "/v1/engines",
    ],
)
def test_unknown_paths(server: HttpServer, canary: Canary, path: str) -> None:
    status, _, answer = server.request("GET", path, headers=JSON)
    assert status == 404
    assert error_of(answer)["code"] == "not_found"
    assert server.request("GET", path)[0] == 401  # without the key nothing is told, not even what does not exist
    canary.sang()


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", COMPLETIONS), ("PUT", CHAT), ("DELETE", "/v1/models"), ("POST", "/health"), ("OPTIONS", "/metrics")],
)
def test_methods(server: HttpServer, method: str, path: str) -> None:
    status, headers, answer = server.request(method, path, headers=JSON)
    assert status == 405
    assert headers["allow"]
    error_of(answer)


def test_many_unknown_models_leave_no_trace(server: HttpServer, canary: Canary) -> None:
    with httpx.Client(base_url=server.url, headers=JSON) as client:
        for number in range(300):
            answer = client.post(COMPLETIONS, json={"model": f"../../etc/{number}", "prompt": "x"})
            assert answer.status_code == 404
            assert answer.json()["error"]["code"] == "model_not_found"
        page = client.get("/metrics").text
    assert "etc" not in page
    canary.sang()


def raw(server: HttpServer, data: bytes, wait_s: float = 3.0) -> bytes:
    """Send bytes, read until the server closes or `wait_s` has passed."""
    received = b""
    with socket.create_connection(("127.0.0.1", server.port), timeout=wait_s) as connection:
        with suppress(BrokenPipeError, ConnectionResetError):
            connection.sendall(data)
        with suppress(TimeoutError, ConnectionResetError):
            while piece := connection.recv(65536):
                received += piece
    return received


HEAD = (
    f"POST {COMPLETIONS} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEY}\r\ncontent-type: application/json\r\n"
).encode()


def test_framing(server: HttpServer, canary: Canary) -> None:
    both = raw(server, HEAD + b"content-length: 4\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n", 1.0)
    assert both.split(b"\r\n")[0].endswith((b"400 Bad Request", b"400"))
    endless = raw(server, HEAD + b"transfer-encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * 10, 2.0)
    assert b" 408 " in endless.split(b"\r\n")[0]
    flood = raw(
        server, HEAD + b"transfer-encoding: chunked\r\n\r\n" + (b"100000\r\n" + b"x" * 0x100000 + b"\r\n") * 3, 2.0
    )
    assert b" 413 " in flood.split(b"\r\n")[0]
    declared = raw(server, HEAD + b"content-length: 99999999999\r\n\r\n", 2.0)
    assert b" 413 " in declared.split(b"\r\n")[0]
    twice = raw(server, HEAD + b"authorization: Bearer x\r\ncontent-length: 0\r\n\r\n", 1.0)
    assert b" 401 " in twice.split(b"\r\n")[0]
    canary.sang()


def test_keep_alive_after_an_error_and_pipelining(server: HttpServer) -> None:
    body = json.dumps({"prompt": [400]}).encode()
    bad = HEAD + b"content-length: %d\r\n\r\n" % len(body) + body
    last = b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
    answers = raw(server, bad + bad + last)
    assert answers.count(b"HTTP/1.1 400 ") == 2
    assert answers.count(b"HTTP/1.1 200 ") == 1
    assert answers.endswith(b'{"status":"ok"}')
    assert raw(server, b"GET /health HTTP/1.0\r\n\r\n").endswith(b'{"status":"ok"}')


def test_request_ids(server: HttpServer) -> None:
    body = json.dumps({"prompt": "x"}).encode()
    _, headers, answer = server.request("POST", COMPLETIONS, body, {**JSON, "x-request-id": "mine-1"})
    assert headers["x-request-id"] == "mine-1"
    assert "mine-1" not in json.loads(answer)["id"]
    for bad in ("x" * 10_000, "a b", "é"):
        _, headers, _ = server.request("POST", COMPLETIONS, body, {**JSON, "x-request-id": bad})
        assert "x-request-id" not in headers


def test_a_caller_who_leaves_during_the_upload(server: HttpServer, canary: Canary) -> None:
    for _ in range(20):
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(HEAD + b"content-length: 1000\r\n\r\n{")
    canary.sang()


def test_no_number_of_answers_is_not_json(server: HttpServer, codec: TextCodec, limits: LimitSettings) -> None:
    """Minus infinity among the logprobs leaves as a number that every parser knows."""
    first = deltas([5], logprobs=1)[0]
    assert not isinstance(first, (float, Exception))
    assert first.logprobs is not None
    entry = replace(first.logprobs[0], logprob=-math.inf, top=((6, math.nan),))
    steps = [replace(first, logprobs=(entry,))]
    settings = IngressSettings(("tiny",), CONTEXT, limits=limits)
    with HttpServer(build_app(settings, codec, FakeGenerator(lambda r: steps), Metrics(), FakeFleet())) as other:
        body = json.dumps({"prompt": "x", "logprobs": 1, "max_tokens": 1}).encode()
        answer = other.request("POST", COMPLETIONS, body, JSON)[2]
    assert json.loads(answer, parse_constant=pytest.fail)["choices"][0]["logprobs"]["token_logprobs"] == [-9999.0]
