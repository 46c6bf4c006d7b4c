"""The listening socket: small writes leave at once, and its port is free again afterwards."""

from __future__ import annotations

import asyncio
import statistics
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
            taken: list[float] = []
            for _ in range(20):
                began = time.monotonic()
                assert (await client.get("/health")).status_code == 200
                taken.append(time.monotonic() - began)
            assert statistics.median(taken) < 0.03
        port = listener.port
        await listener.stop()
        again = Listener(app, "127.0.0.1", port, shared=False, drain_s=1)
        again.start()
        assert again.port == port
        await again.stop()

    asyncio.run(main())


@pytest.mark.timeout(60)
def test_one_that_gives_way_to_its_successor_on_the_same_port_loses_nobody(codec: TextCodec) -> None:
    """New connections all the time, while listeners on one shared port come and go."""

    async def main() -> None:
        app = build_app(IngressSettings(("tiny",), CONTEXT), codec, FakeGenerator(), Metrics(), FakeFleet())
        first = Listener(app, "127.0.0.1", 0, shared=True, drain_s=1)
        port, listener, over, answers = first.port, first, asyncio.Event(), []
        listener.start()

        async def ask() -> None:
            while not over.is_set():
                limits = httpx.Limits(max_keepalive_connections=0)
                async with httpx.AsyncClient(trust_env=False, limits=limits) as client:
                    answers.append((await client.get(f"http://127.0.0.1:{port}/health")).status_code)

        askers = [asyncio.create_task(ask()) for _ in range(8)]
        for _ in range(4):
            answered = len(answers)
            async with asyncio.timeout(10):
                while len(answers) < answered + 10:  # noqa: ASYNC110 - other tasks fill it
                    await asyncio.sleep(0.01)
            successor = Listener(app, "127.0.0.1", port, shared=True, drain_s=1)
            successor.start()
            await listener.stop()
            listener = successor
        over.set()
        await asyncio.gather(*askers)
        await listener.stop()
        assert set(answers) == {200}

    asyncio.run(main())


@pytest.mark.timeout(60)
def test_one_that_is_bound_but_not_started_takes_no_connection(codec: TextCodec) -> None:
    async def main() -> None:
        app = build_app(IngressSettings(("tiny",), CONTEXT), codec, FakeGenerator(), Metrics(), FakeFleet())
        serving = Listener(app, "127.0.0.1", 0, shared=True, drain_s=1)
        serving.start()
        waiting = Listener(app, "127.0.0.1", serving.port, shared=True, drain_s=1)
        for _ in range(20):
            async with httpx.AsyncClient(trust_env=False, timeout=5.0) as client:
                assert (await client.get(f"http://127.0.0.1:{serving.port}/health")).status_code == 200
        await waiting.stop()
        await serving.stop()

    asyncio.run(main())
