"""HTTPS on our own listener: the `openai` package, our handles and `penstock status`'s way, and who is turned away."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from fakes.certificates import Authority
from fakes.fake_generator import FakeFleet, FakeGenerator, deltas
from fakes.tiny_model import CONTEXT

from penstock.cluster.client import Handle, connect
from penstock.cluster.ingress.app import build_app
from penstock.cluster.ingress.listener import Listener
from penstock.cluster.ingress.settings import IngressSettings
from penstock.cluster.metrics import Metrics
from penstock.cluster.settings import LimitSettings
from penstock.cluster.text import TextCodec
from penstock.cluster.trust import pinned
from penstock.workers.errors import ConfigError, RefusedError
from penstock.workers.settings import TlsSettings
from penstock.workers.tls import server_context

pytestmark = pytest.mark.timeout(60)
TEXT = "naïve café ☃ fox"


def serving(codec: TextCodec, tls: TlsSettings, work: Callable[[str], None], **limits: Any) -> None:
    """Run `work(url)` in a thread beside a listener with this certificate."""

    async def main() -> None:
        generator = FakeGenerator(lambda request: deltas(codec.encode(TEXT, "prompt")))
        app = build_app(IngressSettings(("tiny",), CONTEXT), codec, generator, Metrics(), FakeFleet())
        bounds = LimitSettings(**limits)
        context = server_context(tls)
        listener = Listener(app, "127.0.0.1", 0, shared=False, drain_s=1, limits=bounds, tls=context)
        listener.start()
        try:
            await asyncio.to_thread(work, f"https://127.0.0.1:{listener.port}")
        finally:
            await listener.stop()

    asyncio.run(main())


def closing(handle: Handle, work: Callable[[Handle], None]) -> None:
    try:
        work(handle)
    finally:
        handle.close()


def test_openai_and_our_handles_are_answered(codec: TextCodec, tmp_path: Path, monkeypatch: Any) -> None:
    authority = Authority(tmp_path)

    def work(url: str) -> None:
        known = ssl.create_default_context(cafile=str(authority.file))
        with openai.OpenAI(
            base_url=f"{url}/v1", api_key="none", max_retries=0, http_client=httpx.Client(verify=known)
        ) as client:
            stream = client.completions.create(model="tiny", prompt="hello", max_tokens=64, stream=True)
            assert "".join(chunk.choices[0].text for chunk in stream) == TEXT

        def ask(handle: Handle) -> None:
            assert handle.generate("hello", max_tokens=64).text == TEXT
            assert "".join(chunk.text for chunk in handle.stream("hello", max_tokens=64)) == TEXT
            assert [answer.text for answer in handle.batch(["hello"] * 3, max_tokens=64)] == [TEXT] * 3

        closing(connect(url, ca_file=str(authority.file)), ask)
        monkeypatch.setenv("PENSTOCK_CA_FILE", str(authority.file))
        closing(connect(url), ask)

    serving(codec, authority.settings(internal=False), work)


def test_another_authority_is_refused_by_the_caller(codec: TextCodec, tmp_path: Path) -> None:
    foreign = Authority(tmp_path, "foreign")

    def work(url: str) -> None:
        def ask(handle: Handle) -> None:
            with pytest.raises(RefusedError, match="certificate verify failed"):
                handle.generate("hello")

        closing(connect(url, ca_file=str(foreign.file)), ask)
        closing(connect(url), ask)  # the system's authorities did not sign it either

    serving(codec, Authority(tmp_path).settings(internal=False), work)


def test_plain_http_gets_nothing(codec: TextCodec, tmp_path: Path) -> None:
    def work(url: str) -> None:
        with pytest.raises(httpx.TransportError):
            httpx.get(url.replace("https", "http") + "/health", trust_env=False)

    serving(codec, Authority(tmp_path).settings(internal=False), work)


def test_who_never_finishes_the_handshake_is_cut(codec: TextCodec, tmp_path: Path) -> None:
    def work(url: str) -> None:
        port = int(url.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port)) as silent:
            silent.settimeout(10.0)
            assert silent.recv(1) == b""

    serving(codec, Authority(tmp_path).settings(internal=False), work, body_timeout_s=0.3)


def test_the_launcher_knows_its_own_server_by_its_certificate(codec: TextCodec, tmp_path: Path) -> None:
    """Whatever name it carries, and whoever signed it; another one is not taken for it."""
    settings, other = Authority(tmp_path).settings(), Authority(tmp_path, "other").settings()

    def work(url: str) -> None:
        with httpx.Client(trust_env=False, verify=pinned(settings.cert_file)) as client:
            assert client.get(f"{url.replace('127.0.0.1', 'localhost')}/health").status_code == 200
        with (
            httpx.Client(trust_env=False, verify=pinned(other.cert_file)) as client,
            pytest.raises(httpx.ConnectError, match="certificate verify failed"),
        ):
            client.get(f"{url}/health")

    serving(codec, settings, work)


def test_a_ca_file_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "empty").write_bytes(b"")
    for name in ("empty", "missing"):
        with pytest.raises(ConfigError, match=name):
            connect("https://127.0.0.1:1", ca_file=str(tmp_path / name))
