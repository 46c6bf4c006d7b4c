"""The application's own behaviour: routes, health, streams as bytes, leaving callers, slow readers, many choices."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from fakes.fake_generator import FakeFleet, FakeGenerator, Step, deltas
from fakes.tiny_model import CONTEXT

from penstock.cluster.ingress.app import build_app
from penstock.cluster.ingress.settings import IngressSettings
from penstock.cluster.key_file import KeyEntry, key_digest
from penstock.cluster.metrics import Metrics
from penstock.cluster.settings import LimitSettings
from penstock.cluster.text import TextCodec
from penstock.workers.errors import RefusedError
from penstock.workers.protocol import EndReason, FailureCode, GenerateRequest

pytestmark = pytest.mark.timeout(60)
JSON = {"content-type": "application/json"}


def endless(request: GenerateRequest) -> list[Step]:
    steps: list[Step] = []
    for step in deltas([5] * 5000, EndReason.LENGTH):
        steps += [0.005, step]
    return steps


def wait_for(condition: Any, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.01)


def test_health_ready_status_metrics(serve: Any) -> None:
    fleet = FakeFleet()
    server = serve(FakeGenerator(), fleet)
    assert server.request("GET", "/ready")[0] == 200
    head = server.request("HEAD", "/health")
    assert (head[0], head[2]) == (200, b"")
    fleet.reason = "no decode worker is up"
    status, headers, body = server.request("GET", "/ready")
    assert (status, headers["retry-after"]) == (503, "1")
    assert b"no decode worker" in body
    assert server.request("GET", "/health")[0] == 200
    found = json.loads(server.request("GET", "/status")[2])
    assert found["ready"] is False
    assert found["vocab_size"] == 400
    assert found["workers"][0]["id"] == "prefill-0"
    assert found["workers"][0]["kv_use"] == 0.25
    server.request("POST", "/v1/completions", b'{"prompt":[5,6],"max_tokens":3}', JSON)
    server.request("GET", "/nope/with/some/text")
    page = server.request("GET", "/metrics")[2].decode()
    assert 'penstock_http_requests_total{handler="/v1/completions",method="POST",status="200"} 1.0' in page
    assert 'penstock_http_requests_total{handler="other",method="GET",status="404"} 1.0' in page
    assert 'penstock_kv_cache_usage_perc{model_name="penstock",role="prefill",worker="prefill-0"} 0.25' in page
    assert 'penstock_generation_tokens_total{model_name="penstock"} 3.0' in page
    assert 'penstock_time_to_first_token_seconds_count{model_name="penstock"} 1.0' in page
    assert "nope" not in page


def test_models(serve: Any) -> None:
    server = serve(FakeGenerator())
    found = json.loads(server.request("GET", "/v1/models")[2])
    assert [m["id"] for m in found["data"]] == ["tiny", "other-name"]
    assert found["data"][0]["max_model_len"] == CONTEXT
    assert json.loads(server.request("GET", "/v1/models/other-name")[2])["root"] == "tiny"


@pytest.mark.parametrize("http", ["httptools", "h11"])
def test_bytes_of_a_stream(serve: Any, http: str) -> None:
    server = serve(FakeGenerator(), http=http)
    body = json.dumps({"prompt": [70, 71], "max_tokens": 2, "stream": True}).encode()
    status, headers, answer = server.request("POST", "/v1/completions", body, JSON)
    assert status == 200
    assert headers["content-type"].startswith("text/event-stream")
    assert headers["cache-control"] == "no-store"
    assert headers["x-accel-buffering"] == "no"
    events = answer.decode().split("\n\n")
    assert events[-1] == ""
    assert events[-2] == "data: [DONE]"
    assert all(event.startswith("data: ") for event in events[:-1])
    assert len(events) == 4


@pytest.mark.parametrize("http", ["httptools", "h11"])
def test_a_broken_stream_is_broken_on_the_wire_too(serve: Any, http: str) -> None:
    """An error event, no [DONE], and no clean end of the chunked body."""
    steps = [deltas([5, 6])[0], RefusedError(FailureCode.WORKER_LOST, "gone")]
    server = serve(FakeGenerator(lambda request: steps), http=http)
    received = b""
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as connection:
        body = b'{"prompt":[5],"stream":true}'
        head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        connection.sendall(head + b"content-length: %d\r\n\r\n" % len(body) + body)
        while piece := connection.recv(65536):
            received += piece
    assert b'data: {"error"' in received
    assert b"[DONE]" not in received
    assert not received.endswith(b"0\r\n\r\n")


@pytest.mark.parametrize("stream", [True, False])
def test_a_leaving_caller_cancels_everything(serve: Any, stream: bool) -> None:
    generator = FakeGenerator(endless)
    server = serve(generator)
    body = json.dumps({"prompt": [5] * 20, "n": 3, "max_tokens": 400, "stream": stream}).encode()
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        connection.sendall(head + b"content-length: %d\r\n\r\n" % len(body) + body)
        wait_for(lambda: len(generator.submitted) == 3)
    wait_for(lambda: len(generator.cancelled) == 3, 1.0)
    assert server.request("GET", "/health")[0] == 200


def test_a_reader_that_takes_nothing_is_cut_off(serve: Any) -> None:
    """Its generation ends; a neighbour streams on undisturbed."""

    def flood(request: GenerateRequest) -> list[Step]:
        if request.prompt == (6,):
            return deltas([6] * 50)
        return [0.002, deltas([5] * 4000, EndReason.NONE, size=4000)[0]] * 2000

    generator = FakeGenerator(flood)
    server = serve(generator, max_model_len=1 << 24, limits=LimitSettings(write_timeout_s=0.5))
    body = b'{"prompt":[5],"max_tokens":8000000,"stream":true,"return_token_ids":true}'
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", server.port))
        head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        connection.sendall(head + b"content-length: %d\r\n\r\n" % len(body) + body)
        wait_for(lambda: generator.cancelled)
        neighbour = server.request("POST", "/v1/completions", b'{"prompt":[6],"max_tokens":50,"stream":true}', JSON)
        assert neighbour[2].endswith(b"[DONE]\n\n")


def test_too_many_open_requests(serve: Any) -> None:
    generator = FakeGenerator(endless)
    server = serve(generator, limits=LimitSettings(max_open_requests=1))
    with httpx.Client(base_url=server.url) as client:
        with client.stream("POST", "/v1/completions", json={"prompt": [5], "max_tokens": 400, "stream": True}):
            refused = client.post("/v1/completions", json={"prompt": [5]})
            assert refused.status_code == 503
            assert refused.json()["error"]["code"] == "overloaded"
            assert refused.headers["retry-after"] == "1"
        wait_for(lambda: generator.cancelled)
        wait_for(lambda: client.post("/v1/completions", json={"prompt": [5], "n": 0}).status_code == 400)


def test_without_a_tokenizer(serve: Any) -> None:
    server = serve(FakeGenerator(), codec=TextCodec(400, (2,)))
    status, _, answer = server.request("POST", "/v1/completions", b'{"prompt":[5,6],"max_tokens":2}', JSON)
    assert status == 200
    assert json.loads(answer)["choices"][0]["token_ids"] == [6, 5]
    for body, param in (
        (b'{"prompt":"text"}', "prompt"),
        (b'{"prompt":[5],"stop":"x"}', "stop"),
    ):
        status, _, answer = server.request("POST", "/v1/completions", body, JSON)
        assert (status, json.loads(answer)["error"]["param"]) == (400, param)
    chat = b'{"messages":[{"role":"user","content":"x"}]}'
    assert server.request("POST", "/v1/chat/completions", chat, JSON)[0] == 400
    logprobs = b'{"prompt":[5,6],"max_tokens":1,"logprobs":1}'
    found = json.loads(server.request("POST", "/v1/completions", logprobs, JSON)[2])["choices"][0]["logprobs"]
    assert found["tokens"] == ["token_id:6"]
    assert set(found["top_logprobs"][0]) == {"token_id:6"}


def test_token_ids_in_both_apis(serve: Any, codec: TextCodec) -> None:
    server = serve(FakeGenerator())
    chat = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2, "return_token_ids": True}
    whole = json.loads(server.request("POST", "/v1/chat/completions", json.dumps(chat).encode(), JSON)[2])
    prompt = whole["prompt_token_ids"]
    assert codec.decode(prompt, skip_special_tokens=False) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert whole["choices"][0]["token_ids"] == prompt[:-3:-1]
    streamed = server.request("POST", "/v1/chat/completions", json.dumps({**chat, "stream": True}).encode(), JSON)[2]
    events = [json.loads(e[6:]) for e in streamed.decode().split("\n\n")[:-2]]
    assert events[0]["prompt_token_ids"] == prompt
    assert [t for e in events for t in e["choices"][0].get("token_ids", [])] == prompt[:-3:-1]


async def _call(app: Any, body: dict[str, Any]) -> list[dict[str, Any]]:
    """One request without a server; the caller stays."""
    messages: list[dict[str, Any]] = []
    inbox = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]

    async def receive() -> dict[str, Any]:
        if not inbox:
            await asyncio.Event().wait()
        return inbox.pop()

    async def send(message: dict[str, Any]) -> None:
        messages.append(message)

    headers = [(b"host", b"x"), (b"content-type", b"application/json")]
    scope = {"type": "http", "http_version": "1.1", "method": "POST", "path": "/v1/completions", "headers": headers}
    await app(scope, receive, send)
    return messages


@pytest.mark.parametrize(
    ("prompt_tokens", "caching", "together"), [(20, True, False), (20, False, True), (5, True, True)]
)
def test_the_first_of_n_choices_goes_ahead(codec: TextCodec, prompt_tokens: int, caching: bool, together: bool) -> None:
    """The others are submitted once it has a token: its blocks are cached by then. Without blocks, all at once."""
    order: list[tuple[str, int]] = []

    def script(request: GenerateRequest) -> Iterator[Step]:
        yield 0.02
        for step in deltas([5, 6]):
            order.append(("token", request.sampling.choice))
            yield step

    class Watched(FakeGenerator):
        def submit(self, request: GenerateRequest) -> Any:
            order.append(("asked", request.sampling.choice))
            return super().submit(request)

    generator = Watched(script)
    settings = IngressSettings(("tiny",), CONTEXT, prefix_caching=caching)
    app = build_app(settings, codec, generator, Metrics(), FakeFleet())
    messages = asyncio.run(_call(app, {"prompt": [5] * prompt_tokens, "n": 3, "max_tokens": 2}))
    assert messages[0]["status"] == 200
    for other in (1, 2):
        assert (order.index(("asked", other)) < order.index(("token", 0))) == together
    first, second, third = generator.submitted
    assert [r.sampling.choice for r in (first, second, third)] == [0, 1, 2]
    assert first.sampling.seed == second.sampling.seed == third.sampling.seed
    assert len({r.request_id for r in generator.submitted}) == 3
    assert first.prefix_digests == second.prefix_digests
    assert len(first.prefix_digests) == (32 * (prompt_tokens // 16) if caching else 0)
    assert first.cache_prefix is caching


def test_one_failing_choice_ends_them_all(codec: TextCodec) -> None:
    def script(request: GenerateRequest) -> list[Step]:
        if request.sampling.choice == 1:
            return [RefusedError(FailureCode.QUEUE_FULL, "full", 2.0)]
        return endless(request)

    generator = FakeGenerator(script)
    app = build_app(IngressSettings(("tiny",), CONTEXT), codec, generator, Metrics(), FakeFleet())
    messages = asyncio.run(_call(app, {"prompt": [5] * 20, "n": 3, "max_tokens": 50}))
    assert messages[0]["status"] == 503
    assert (b"retry-after", b"2") in messages[0]["headers"]
    assert len(generator.cancelled) >= 1
    assert len(generator.cancelled) == len(generator.submitted) - 1


def test_prefix_roots_keep_callers_apart(codec: TextCodec) -> None:
    generator = FakeGenerator()
    app = build_app(IngressSettings(("tiny",), CONTEXT, revision="r"), codec, generator, Metrics(), FakeFleet())
    other = build_app(IngressSettings(("tiny",), CONTEXT, revision="s"), codec, generator, Metrics(), FakeFleet())
    for target, salt in ((app, None), (app, "a"), (app, "b"), (app, "a"), (other, "a")):
        body: dict[str, Any] = {"prompt": [5] * 20, "max_tokens": 1}
        asyncio.run(_call(target, body if salt is None else {**body, "cache_salt": salt}))
    roots = [r.prefix_root for r in generator.submitted]
    assert roots[1] == roots[3]
    assert len(set(roots)) == 4
    assert len({r.prefix_digests for r in generator.submitted}) == 4


def test_seeds(codec: TextCodec) -> None:
    generator = FakeGenerator()
    app = build_app(IngressSettings(("tiny",), CONTEXT), codec, generator, Metrics(), FakeFleet())
    for seed in (7, -1, None, None):
        asyncio.run(_call(app, {"prompt": [5], "max_tokens": 1, "seed": seed}))
    seeds = [r.sampling.seed for r in generator.submitted]
    assert seeds[:2] == [7, 2**64 - 1]
    assert seeds[2] != seeds[3]
    assert all(0 <= seed < 2**64 for seed in seeds)


def test_lifespan_and_websockets(codec: TextCodec) -> None:
    app = build_app(IngressSettings(("tiny",), CONTEXT), codec, FakeGenerator(), Metrics(), FakeFleet())
    sent: list[dict[str, Any]] = []
    inbox = [{"type": "lifespan.shutdown"}, {"type": "lifespan.startup"}]

    async def receive() -> dict[str, Any]:
        return inbox.pop()

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    asyncio.run(app({"type": "lifespan"}, receive, send))
    asyncio.run(app({"type": "websocket"}, receive, send))
    assert [m["type"] for m in sent] == ["lifespan.startup.complete", "lifespan.shutdown.complete", "websocket.close"]


def test_a_busy_cluster_says_so_before_anything_is_parsed(serve: Any) -> None:
    generator = FakeGenerator(full_for=frozenset({"default"}))
    server = serve(generator)
    headers = {"content-type": "application/json"}
    status, told, body = server.request("POST", "/v1/completions", b"this is no JSON", headers)
    assert (status, told["retry-after"]) == (503, "3")
    assert json.loads(body)["error"]["code"] == "overloaded"
    assert generator.submitted == []


@pytest.mark.parametrize(
    ("stated", "status", "patience_s"),
    [(None, 200, 60.0), ("1.5", 200, 1.5), ("900", 200, 60.0), ("0", 400, None), ("-1", 400, None), ("inf", 400, None)],
)
def test_callers_may_ask_for_less_patience(
    serve: Any, stated: str | None, status: int, patience_s: float | None
) -> None:
    generator = FakeGenerator()
    headers = {"content-type": "application/json"} | ({} if stated is None else {"x-penstock-ttft-target": stated})
    body = json.dumps({"model": "tiny", "prompt": [5] * 4, "max_tokens": 2}).encode()
    answered, _, _ = serve(generator).request("POST", "/v1/completions", body, headers)
    assert answered == status
    assert [each.queue_timeout_s for each in generator.submitted] == ([] if patience_s is None else [patience_s])


def test_a_key_may_have_a_target_of_its_own(serve: Any) -> None:
    generator = FakeGenerator()
    key = KeyEntry("quick", key_digest("sk-quick"), ttft_target_s=3)
    server = serve(generator, keys=(key,))
    headers = {"content-type": "application/json", "authorization": "Bearer sk-quick"}
    body = json.dumps({"model": "tiny", "prompt": [5] * 4, "max_tokens": 2}).encode()
    for stated in ({}, {"x-penstock-ttft-target": "8"}):
        assert server.request("POST", "/v1/completions", body, headers | stated)[0] == 200
    assert [each.queue_timeout_s for each in generator.submitted] == [3, 3]
