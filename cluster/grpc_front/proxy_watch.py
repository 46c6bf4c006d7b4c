"""Ends the calls that came by a proxy of Serve's which has died.

Serve cancels a request whose caller leaves, through the proxy that relays it. When the proxy dies itself, nobody does:
Ray lets what a dead actor asked for run on. So `relay.py` signs the calls in the proxy, and `deployment.py` has the
signer watched while they run. HTTP needs no such watch: its messages come from the proxy, and break off with it.
Belongs to one asyncio loop; no call waits for it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayActorError

from penstock.cluster.grpc_front.relay import SIGNATURE

SERVE_NAMESPACE = "serve"
LOOK_EVERY_S = 1.0

log = logging.getLogger(__name__)

Look = Callable[[], Awaitable[None]]
Find = Callable[[str], Awaitable[Look]]


class ProxyGone(Exception):  # noqa: N818 - an event
    """The proxy has died."""


class ProxyWatch:
    """The calls under way of one ingress replica, by the proxy that relays them."""

    def __init__(self, find: Find | None = None, look_every_s: float = LOOK_EVERY_S) -> None:
        """`find`: from an actor's name to what raises ProxyGone once it has died; Ray's actors by default."""
        self._find = find or find_actor
        self._look_every_s = look_every_s
        self._calls: dict[str, set[asyncio.Task[Any]]] = {}
        self._watchers: set[asyncio.Future[None]] = set()

    @contextmanager
    def over(self, metadata: Sequence[tuple[str, str | bytes]]) -> Iterator[None]:
        """While a call with this metadata runs: its task is cancelled once the proxy that signed it has died."""
        task = asyncio.current_task()
        signed = next((str(value) for name, value in metadata if name == SIGNATURE), "")
        if not signed or task is None:
            yield
            return
        calls = self._calls.get(signed)
        if calls is None:
            calls = self._calls[signed] = set()
            watcher = asyncio.ensure_future(self._watch(signed, calls))
            self._watchers.add(watcher)
            watcher.add_done_callback(self._watchers.discard)
        calls.add(task)
        try:
            yield
        finally:
            calls.discard(task)

    async def _watch(self, signed: str, calls: set[asyncio.Task[Any]]) -> None:
        """Until no call of the proxy is left, or the proxy has died."""
        look: Look | None = None
        try:
            while True:
                await asyncio.sleep(self._look_every_s)
                if not calls:
                    return
                try:
                    look = look or await self._find(signed.rpartition("/")[0])
                    await look()
                except ProxyGone:
                    log.warning("proxy %s has died: its %d calls end", signed, len(calls))
                    for task in calls:
                        task.cancel()
                    return
                except Exception as error:  # noqa: BLE001 - whatever keeps Ray from answering, the proxy may live
                    log.warning("cannot look after proxy %s: %s", signed, error)
        finally:
            del self._calls[signed]


async def find_actor(name: str) -> Look:
    """What looks after one of Serve's actors. Raises ProxyGone where there is none of the name."""
    try:
        actor = await asyncio.to_thread(ray.get_actor, name, namespace=SERVE_NAMESPACE)
    except ValueError:
        raise ProxyGone from None

    async def look() -> None:
        try:
            await actor.__ray_ready__.remote()
        except ActorUnavailableError:
            return  # it cannot be reached; it may live
        except RayActorError:
            raise ProxyGone from None

    return look
