"""The watch over Ray's control store: patience, one question at a time, and errors that are no silence."""

from __future__ import annotations

import asyncio
import threading

import pytest
from ray.exceptions import RaySystemError

from penstock.cluster import plan_store
from penstock.cluster.plan_store import StoreWatch


def test_a_silent_store_is_asked_once_and_heard_when_it_is_back(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, back = [], threading.Event()

    def load(cluster_id: str) -> None:
        asked.append(cluster_id)
        back.wait(10)

    monkeypatch.setattr(plan_store, "load_plan", load)

    async def scenario() -> None:
        watch = StoreWatch("c", 0.02)
        assert [await watch.answers() for _ in range(5)] == [False] * 5
        assert asked == ["c"]
        back.set()
        async with asyncio.timeout(5):
            while not await watch.answers():
                pass
        assert await watch.answers()
        assert asked == ["c", "c"]

    asyncio.run(scenario())


def test_ray_that_says_it_cannot_is_away_and_a_defect_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    errors: list[Exception] = [RaySystemError("no store"), KeyError("plan")]

    def load(_cluster_id: str) -> None:
        raise errors.pop(0)

    monkeypatch.setattr(plan_store, "load_plan", load)

    async def scenario() -> None:
        watch = StoreWatch("c", 5.0)
        assert not await watch.answers()
        with pytest.raises(KeyError):
            await watch.answers()

    asyncio.run(scenario())
