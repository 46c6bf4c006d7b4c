"""The listening socket: small writes leave at once, and its port is free again afterwards."""

from __future__ import annotations

import asyncio
import time

import httpx
import pytest
from fakes.fake_generator import FakeFleet, FakeGenerator
from fakes.tiny_model import CONTEXT

from penstock.cluster.ingress.app import build_app
from penstock.cluster.ingress.listener import Listener
from penstock.cluster.ingress.settings import IngressSettings
from penstock.cluster.metrics import Metrics
from penstock.cluster.text import TextCodec


@pytest.mark.timeout(60)
def test_answers_are_not_delayed_and_the_port_is_reusable(codec: TextCodec) -> None:
    """Without TCP_NODELAY the body of every answer on a kept connection waits 40 ms for the headers' ACK."""

    async def main() -> None:
        app = build_app(IngressSettings(("tiny",), CONTEXT), codec, FakeGenerator(), Metrics(), FakeFleet())
        listener = Listener(app, "127.0.0.1", 0, shared=False, drain_s=1)
        listener.start()
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{listener.port}") as client:
            await client.get("/health")
            began = time.monotonic()
            for _ in range(20):
                assert (await client.get("/health")).status_code == 200
            assert time.monotonic() - began < 0.6
        port = listener.port
        await listener.stop()
        again = Listener(app, "127.0.0.1", port, shared=False, drain_s=1)
        again.start()
        assert again.port == port
        await again.stop()

    asyncio.run(main())
