"""Calls end with the proxy that relays them, and no other call does; a proxy that cannot be asked may live."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

from penstock.cluster.grpc_front.proxy_watch import Look, ProxyGone, ProxyWatch
from penstock.cluster.grpc_front.relay import SIGNATURE, Signed


class Actors:
    """Ray's actors: by name, how often each was started. `looks` counts the questions."""

    def __init__(self, *names: str) -> None:
        self.started = dict.fromkeys(names, 1)
        self.silent = False
        self.looks = 0

    async def find(self, name: str) -> Look:
        found = self.started.get(name)
        if found is None:
            raise ProxyGone

        async def look() -> None:
            self.looks += 1
            if self.silent:
                raise OSError("no answer")
            if self.started.get(name) != found:
                raise ProxyGone

        return look


def signed(signature: str, *stated: tuple[str, str]) -> Any:
    """Metadata as the replica has them."""
    return list(Signed(SimpleNamespace(invocation_metadata=lambda: stated), signature).invocation_metadata())


async def call(watch: ProxyWatch, metadata: Any, seconds: float = 30.0) -> str:
    with suppress(asyncio.CancelledError), watch.over(metadata):
        await asyncio.sleep(seconds)
        return "answered"
    return "cancelled"


def test_the_calls_of_a_dead_proxy_end_and_no_others() -> None:
    async def main() -> None:
        actors = Actors("one", "two")
        watch = ProxyWatch(actors.find, 0.02)
        gone = [asyncio.ensure_future(call(watch, signed("one/1"))) for _ in range(3)]
        stay = [asyncio.ensure_future(call(watch, metadata, 0.6)) for metadata in (signed("two/1"), signed(""), [])]
        await asyncio.sleep(0.2)
        assert not any(task.done() for task in gone + stay)
        del actors.started["one"]
        assert await asyncio.wait_for(asyncio.gather(*gone), 5) == ["cancelled"] * 3
        assert await asyncio.gather(*stay) == ["answered"] * 3

    asyncio.run(main())


def test_a_proxy_that_comes_back_under_its_name_is_another() -> None:
    async def main() -> None:
        actors = Actors("one")
        watch = ProxyWatch(actors.find, 0.02)
        before = asyncio.ensure_future(call(watch, signed("one/1")))
        await asyncio.sleep(0.2)
        actors.started["one"] += 1
        after = asyncio.ensure_future(call(watch, signed("one/2"), 0.5))
        assert await asyncio.wait_for(before, 5) == "cancelled"
        assert await after == "answered"

    asyncio.run(main())


def test_a_proxy_that_cannot_be_asked_may_live() -> None:
    async def main() -> None:
        actors = Actors("one")
        watch = ProxyWatch(actors.find, 0.02)
        pending = asyncio.ensure_future(call(watch, signed("one/1"), 0.5))
        await asyncio.sleep(0.1)
        actors.silent = True
        await asyncio.sleep(0.1)
        actors.silent = False
        assert await pending == "answered"

    asyncio.run(main())


def test_nobody_is_asked_once_the_calls_are_over() -> None:
    async def main() -> None:
        actors = Actors("one")
        watch = ProxyWatch(actors.find, 0.02)
        for _ in range(5):
            assert await call(watch, signed("one/1"), 0.1) == "answered"
        assert actors.looks > 5
        await asyncio.sleep(0.1)
        looks = actors.looks
        await asyncio.sleep(0.2)
        assert actors.looks == looks

    asyncio.run(main())


def test_the_signature_is_the_relays_own() -> None:
    assert signed("one/1", ("a", "b"), (SIGNATURE, "two/1")) == [("a", "b"), (SIGNATURE, "one/1")]
