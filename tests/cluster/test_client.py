"""The Python handle against the application: typed results and typed errors, blocking and on asyncio."""

from __future__ import annotations

import asyncio
import importlib.util
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes.fake_generator import FakeFleet, FakeGenerator, deltas
from fakes.http_server import HttpServer
from fakes.tiny_model import CONTEXT

from penstock.cluster.client import Handle, connect
from penstock.cluster.ingress.app import build_app
from penstock.cluster.ingress.settings import IngressSettings
from penstock.cluster.metrics import Metrics
from penstock.cluster.text import TextCodec
from penstock.workers.errors import ConfigError, RefusedError, RequestError
from penstock.workers.protocol import EndReason, FailureCode

pytestmark = pytest.mark.timeout(60)
CHAT: Any = [{"role": "user", "content": "hello"}]
Connect = Callable[..., Handle]


@pytest.fixture
def handle_on(codec: TextCodec) -> Iterator[Connect]:
    with ExitStack() as stack:

        def start(generator: FakeGenerator, server_key: str = "", key: str = "") -> Handle:
            settings = IngressSettings(("tiny",), CONTEXT, api_key=server_key)
            server = stack.enter_context(HttpServer(build_app(settings, codec, generator, Metrics(), FakeFleet())))
            return stack.enter_context(connect(server.url, key))

        yield start


def test_generate(handle_on: Connect, codec: TextCodec) -> None:
    tokens = tuple(codec.encode("naïve ☃", "prompt"))
    script = lambda request: deltas(tokens, EndReason.LENGTH, logprobs=request.sampling.logprobs)  # noqa: E731
    handle = handle_on(FakeGenerator(script, cached=2))
    answer = handle.generate("hello", max_tokens=20, n=2, logprobs=1)
    assert (answer.text, answer.token_ids) == ("naïve ☃", tokens)
    assert len(answer.choices) == 2
    assert answer.choices[1].finish_reason == "length"
    assert answer.usage.cached_tokens == 2
    assert answer.usage.completion_tokens == 2 * len(tokens)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert [entry.logprob for entry in logprobs] == [-0.5 * t for t in tokens]
    assert handle.generate([5, 6, 7]).token_ids == tokens
    assert handle.generate(CHAT).text == "naïve ☃"
    chat = handle.generate(CHAT, logprobs=2).choices[0].logprobs
    assert chat is not None
    assert [len(entry.top) for entry in chat] == [2] * len(tokens)


def test_stream(handle_on: Connect, codec: TextCodec) -> None:
    tokens = tuple(codec.encode("naïve ☃", "prompt"))
    handle = handle_on(FakeGenerator(lambda request: deltas(tokens)))
    for prompt in ("hello", [5, 6], CHAT):
        chunks = list(handle.stream(prompt, max_tokens=50))
        assert "".join(c.text for c in chunks) == "naïve ☃"
        assert tuple(t for c in chunks for t in c.token_ids) == tokens
        assert [c.finish_reason for c in chunks if c.finish_reason] == ["length"]
        usage = chunks[-1].usage
        assert usage is not None
        assert usage.completion_tokens == len(tokens)


def test_on_asyncio(handle_on: Connect, codec: TextCodec) -> None:
    tokens = codec.encode("fox", "prompt")
    handle = handle_on(FakeGenerator(lambda request: deltas(tokens)))

    async def main() -> None:
        answers = await asyncio.gather(*(handle.agenerate("hello") for _ in range(5)))
        assert {a.text for a in answers} == {"fox"}
        text = "".join([c.text async for c in handle.astream(CHAT)])
        assert text == "fox"
        with pytest.raises(RequestError):
            await handle.agenerate("hello", max_tokens=0)
        await handle.aclose()

    asyncio.run(main())


def test_errors_are_typed(handle_on: Connect) -> None:
    handle = handle_on(FakeGenerator(lambda request: [RefusedError(FailureCode.NO_WORKER, "nobody", 4.0)]))
    with pytest.raises(RequestError) as wrong:
        handle.generate("hello", temperature=-1)
    assert (wrong.value.field, wrong.value.code) == ("temperature", "out_of_range")
    with pytest.raises(RequestError) as missing:
        list(handle.stream("hello", model="nobody"))
    assert missing.value.code == "model_not_found"
    for call in (lambda: handle.generate("x"), lambda: list(handle.stream("x"))):
        with pytest.raises(RefusedError) as refused:
            call()
        assert (refused.value.code, refused.value.retry_after_s) == (FailureCode.NO_WORKER, 4.0)
    locked = handle_on(FakeGenerator(), server_key="k", key="wrong")
    with pytest.raises(RequestError) as key:
        locked.generate("x")
    assert key.value.code == "invalid_api_key"


def test_a_stream_that_breaks_raises(handle_on: Connect) -> None:
    steps = [deltas([5, 6])[0], RefusedError(FailureCode.WORKER_LOST, "gone")]
    handle = handle_on(FakeGenerator(lambda request: steps))
    with pytest.raises(RefusedError, match="gone") as caught:
        list(handle.stream("x"))
    assert caught.value.code is FailureCode.WORKER_LOST

    async def main() -> None:
        with pytest.raises(RefusedError, match="gone"):
            _ = [c async for c in handle.astream("x")]
        await handle.aclose()

    asyncio.run(main())


def test_nobody_there() -> None:
    with connect("http://127.0.0.1:1") as handle:
        with pytest.raises(RefusedError, match="cannot reach"):
            handle.generate("x")
        with pytest.raises(RefusedError, match="cannot reach"):
            list(handle.stream("x"))


@pytest.mark.parametrize(
    ("url", "key"),
    [
        ("localhost:8000", ""),
        ("ftp://localhost", ""),
        ("http://", ""),
        ("http://[::1", ""),
        ("http://127.0.0.1:99999", ""),
        ("http://a b", ""),
        ("http://a\n", ""),
        ("http://127.0.0.1", "kéy"),
        ("http://127.0.0.1", "a\nb"),
        ("http://127.0.0.1", "a b"),
    ],
)
def test_what_is_no_url_or_no_key_is_told_at_once(url: str, key: str) -> None:
    with pytest.raises(ConfigError) as wrong:
        connect(url, key)
    assert wrong.value.key == ("api_key" if key else "url")
    assert not key or key not in str(wrong.value)


def test_a_server_that_ends_a_stream_early(tmp_path: Path) -> None:
    """Any server, also one that ends the body cleanly without [DONE]: the caller hears of it."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await receive()
            await send({"type": "lifespan.startup.complete"})
            await receive()
            await send({"type": "lifespan.shutdown.complete"})
            return
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        await send({"type": "http.response.body", "body": b": ping\n\n"})

    with HttpServer(app) as server, connect(server.url) as handle, pytest.raises(RefusedError, match="broke before"):
        list(handle.stream("x"))


def test_prompts_are_scored(handle_on: Connect, codec: TextCodec) -> None:
    handle = handle_on(FakeGenerator())
    ids = codec.encode("hello fox", "prompt")
    for prompt in ("hello fox", ids):
        score = handle.score(prompt, top=2)
        assert score.token_ids == tuple(ids)
        assert [entry.logprob for entry in score.logprobs] == [None, *(-0.25 * t for t in ids[1:])]
        assert [len(entry.top) for entry in score.logprobs] == [0] + [2] * (len(ids) - 1)
        assert score.total == sum(-0.25 * t for t in ids[1:])
        assert score.perplexity == pytest.approx(math.exp(-score.total / (len(ids) - 1)))
        assert score.usage.completion_tokens == 0
    chat = handle.score(CHAT)
    assert len(chat.logprobs) == len(chat.token_ids) > 1
    answer = handle.generate("hello fox", prompt_logprobs=1, max_tokens=2)
    assert answer.prompt_logprobs is not None
    assert answer.prompt_logprobs[1].logprob == -0.25 * ids[1]
    assert answer.choices[0].prompt_token_ids == tuple(ids)


def test_echo_keeps_the_prompts_place_in_the_logprobs(handle_on: Connect, codec: TextCodec) -> None:
    handle = handle_on(FakeGenerator())
    answer = handle.generate("hello fox", echo=True, logprobs=1, max_tokens=2)
    assert answer.text.startswith("hello fox")
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert len(logprobs) == len(codec.encode("hello fox", "prompt")) + 2
    assert logprobs[0].logprob is None
    assert logprobs[1].logprob is not None


def test_texts_become_vectors(handle_on: Connect) -> None:
    handle = handle_on(FakeGenerator())
    found = handle.embed([f"fox {number}" for number in range(130)])  # more than one request holds
    assert found.vectors.shape == (130, 4)
    assert found.vectors.dtype == np.float32
    assert np.linalg.norm(found.vectors, axis=1) == pytest.approx(np.ones(130), abs=1e-6)
    assert found.usage.prompt_tokens > 130
    assert handle.embed([[5, 6], [7]]).vectors.shape == (2, 4)

    async def main() -> None:
        assert (await handle.aembed(["fox"])).vectors.shape == (1, 4)
        assert (await handle.ascore([5, 6])).token_ids == (5, 6)
        await handle.aclose()

    asyncio.run(main())


def test_text_to_ids_and_back(handle_on: Connect, codec: TextCodec) -> None:
    handle = handle_on(FakeGenerator())
    assert handle.tokenize("naïve fox") == tuple(codec.encode("naïve fox", "prompt"))
    assert handle.tokenize(CHAT) == tuple(codec.encode_chat(CHAT, {"add_generation_prompt": True}))
    assert handle.detokenize(handle.tokenize("naïve fox")) == "naïve fox"


def test_answers_carry_the_request_id(handle_on: Connect) -> None:
    handle = handle_on(FakeGenerator())
    assert handle.generate("x", request_id="mine-1").request_id == "mine-1"
    other = handle.generate("x")
    assert other.request_id
    assert other.request_id != "mine-1"
    assert {chunk.id for chunk in handle.stream("x")} != {""}


def test_what_is_not_penstock_is_told(tmp_path: Path) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await receive()
            await send({"type": "lifespan.startup.complete"})
            await receive()
            await send({"type": "lifespan.shutdown.complete"})
            return
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/html")]})
        await send({"type": "http.response.body", "body": b"<html>hello</html>"})

    with HttpServer(app) as server, connect(server.url) as handle:
        for call in (lambda: handle.generate("x"), lambda: handle.embed(["x"]), lambda: handle.tokenize("x")):
            with pytest.raises(RefusedError, match="is not Penstock"):
                call()


def test_importing_it_brings_neither_torch_nor_ray() -> None:
    assert importlib.util.find_spec("ray") is not None
    heavy = "{'torch', 'ray', 'fastapi', 'transformers'}"
    code = f"import penstock.cluster.client, sys; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
