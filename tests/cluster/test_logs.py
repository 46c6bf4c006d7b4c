"""Nothing a caller wrote gets into a log: not through the access log, refusals, crashes, or the workers."""

from __future__ import annotations

import asyncio
import io
import json
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fakes.fake_generator import FakeFleet, FakeGenerator, Step, echo
from fakes.observed_cluster import DECODE, PREFILL, ObservedCluster

from penstock.cluster.ingress.app import build_app
from penstock.cluster.ingress.settings import IngressSettings
from penstock.cluster.logs import begin_logs, harmless, write_access
from penstock.cluster.metrics import Metrics
from penstock.cluster.text import TextCodec
from penstock.workers.protocol import GenerateRequest
from penstock.workers.settings import LogSettings

CANARY = "xyzzy-plugh"
KEY = "sk-very-secret"


@pytest.fixture(params=["text", "json"])
def written(request: pytest.FixtureRequest) -> Iterator[io.StringIO]:
    """Everything this process logs, at the most talkative level."""
    root, stream = logging.getLogger(), io.StringIO()
    handlers, level = root.handlers[:], root.level
    begin_logs(LogSettings(format=request.param, level="debug"), "ingress")
    assert isinstance(root.handlers[0], logging.StreamHandler)
    root.handlers[0].setStream(stream)
    yield stream
    root.handlers[:] = handlers
    root.setLevel(level)


def broken(request: GenerateRequest) -> Iterable[Step]:
    """A defect of ours whose message quotes the request, after the first token."""
    steps = list(echo(request))
    return [steps[0], ValueError(f"{CANARY}: {request}")]


def bodies() -> list[tuple[str, dict[str, Any] | bytes]]:
    text = f"tell me about {CANARY}"
    messages = [{"role": "user", "content": text}]
    return [
        ("/v1/completions", {"prompt": text, "max_tokens": 2}),
        ("/v1/completions", {"prompt": text, "max_tokens": 2, "stream": True}),
        ("/v1/chat/completions", {"messages": messages, "max_tokens": 2, "user": CANARY}),
        ("/v1/completions", {"prompt": text, "model": CANARY}),
        ("/v1/completions", {"prompt": text, "max_tokens": CANARY}),
        ("/v1/completions", {"prompt": text, "stop": [CANARY, 5]}),
        ("/v1/completions", {"prompt": text, "some_field": CANARY}),  # names of unknown fields are told, values never
        ("/v1/completions", b'{"prompt": "' + CANARY.encode() + b'", '),
        ("/v1/completions", b"\xff" + CANARY.encode()),
        ("/v1/chat/completions", {"messages": [{"role": CANARY, "content": text}]}),
        ("/tokenize", {"prompt": text}),
        (f"/v1/{CANARY}", {}),
        (f"/v1/models/{CANARY}", {}),
    ]


@pytest.mark.parametrize("script", [echo, broken])
def test_no_text_and_no_key_in_the_log(codec: TextCodec, written: io.StringIO, script: Any) -> None:
    settings = IngressSettings(model_names=("tiny",), max_model_len=512, api_key=KEY)

    async def run() -> list[int]:
        app = build_app(settings, codec, FakeGenerator(script), Metrics(), FakeFleet())
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        statuses = []
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            for path, body in bodies():
                content = body if isinstance(body, bytes) else json.dumps(body).encode()
                for key in (KEY, CANARY):
                    headers = {
                        "authorization": f"Bearer {key}",
                        "content-type": "application/json",
                        "x-request-id": "my-id" if key == KEY else f"{CANARY}\t\x0bINFO",
                        "user-agent": CANARY,
                    }
                    try:
                        statuses.append((await client.post(path, content=content, headers=headers)).status_code)
                    except AssertionError:
                        statuses.append(0)  # the transport's way to say that a stream broke off
        return statuses

    statuses = asyncio.run(run())
    log = written.getvalue()
    assert 401 in statuses
    assert 400 in statuses
    assert [line for line in log.splitlines() if CANARY in line or KEY in line] == []
    access = [line for line in log.splitlines() if "penstock.access" in line]
    assert len(access) == 2 * len(bodies())
    assert any("my-id" in line and "/v1/completions" in line for line in access)
    assert ("ValueError" in log) == (script is broken)  # a traceback was written, without its message


def test_an_access_line_tells_the_account(written: io.StringIO) -> None:
    write_access("id\r\n1", "POST", "/v1/completions", 200, tenant='a" b', ms=12.5, prompt_tokens=7, workers="p-0,d-0")
    (line,) = written.getvalue().splitlines()
    if line.startswith("{"):
        parsed = json.loads(line)
        assert (parsed["id"], parsed["tenant"], parsed["ms"], parsed["prompt_tokens"]) == ("id??1", "a??b", 12.5, 7)
    else:
        assert "id=id??1" in line
        assert "workers=p-0,d-0" in line


def test_the_access_log_can_be_switched_off(written: io.StringIO) -> None:
    begin_logs(LogSettings(access=False), "ingress")
    logging.getLogger().handlers[0].setStream(written)  # type: ignore[attr-defined]
    write_access("id", "GET", "/health", 200, tenant="t")
    assert written.getvalue() == ""
    begin_logs(LogSettings(), "ingress")


def test_ids_keep_only_harmless_characters() -> None:
    assert harmless("a-b_c.d:e") == "a-b_c.d:e"
    assert harmless("x" * 500) == "x" * 128
    assert set(harmless("\n\x00 =\"'é")) == {"?"}


@pytest.mark.timeout(60)
def test_workers_do_not_log_prompts(tmp_path: Path) -> None:
    log_file = tmp_path / "workers.log"
    prompt = [4321] * 40

    async def run() -> None:
        logs = LogSettings(format="json", level="debug")
        async with ObservedCluster([PREFILL, DECODE], logs=logs, log_file=log_file) as observed:
            assert (await observed.complete(prompt)).status_code == 200
            assert (await observed.complete(prompt, stream=True, stop_token_ids=[4321])).status_code == 200
            assert (await observed.complete([*prompt, 99_999_999])).status_code == 400
            observed.cluster.kill("decode-1")
            await observed.cluster.wait_ready(20.0)
            assert (await observed.complete(prompt)).status_code == 200

    asyncio.run(run())
    lines = log_file.read_text().splitlines()
    assert lines
    assert all(json.loads(line)["part"] in ("prefill-0", "decode-1") for line in lines)
    assert "4321, 4321" not in log_file.read_text()
