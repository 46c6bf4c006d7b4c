"""Streams that are sent from worker to worker while they run, by the router's own moves, as often as they can go."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from penstock.router.router import Router

T = TypeVar("T")


async def while_roaming(router: Router, running: Awaitable[T], every_s: float = 0.002) -> T:
    """What `running` comes to, while every stream of the router is asked to leave wherever it has settled."""
    task = asyncio.ensure_future(running)
    try:
        while not task.done():
            for journey in router._journeys:
                if journey.settled and journey.move is None and not journey.leaving:
                    journey.leaving = True
                    journey.nudge()
            await asyncio.wait([task], timeout=every_s)
        return task.result()
    finally:
        task.cancel()
