"""Hosts workers as detached Ray actors: the controller's way to start, find again, renew and end them.

The controller gives it to the supervisor. Actors are detached, so that they outlive a controller that Ray restarts,
and leased, so that they do not outlive the cluster. One that Ray cannot place yet waits for as long as it takes, and
it is said for what. Knows nothing of what a worker does.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError

from penstock.cluster.discovery import NAMESPACE
from penstock.cluster.editions import ActorNeeds
from penstock.cluster.supervision import StartError
from penstock.workers.actor import WorkerActor
from penstock.workers.settings import WorkerSettings

log = logging.getLogger(__name__)

START_TIMEOUT_S = 600.0  # a large checkpoint from a slow disk
ANSWER_TIMEOUT_S = 5.0
PLACED_WITHIN_S = 8.0  # an actor that is not up after so long probably waits for resources


class HostedActor:
    """One running worker actor."""

    def __init__(self, handle: Any, facts: Mapping[str, object]) -> None:
        self.handle = handle
        self.facts = dict(facts)

    @property
    def address(self) -> str:
        """host:port of its RPC server."""
        return str(self.facts["address"])

    @property
    def pids(self) -> tuple[int, ...]:
        """The actor's process."""
        return (int(str(self.facts["pid"])),)

    @property
    def incarnation(self) -> int:
        """As it was told."""
        return int(str(self.facts["incarnation"]))

    async def ended(self) -> str:
        """Returns once the actor is gone; Ray fails the pending call at once when its process dies."""
        try:
            await self.handle.ended.remote()
        except RayActorError as error:
            ray.kill(self.handle)  # it may only be out of reach; a successor is about to start
            return str(error).strip().splitlines()[0] if str(error) else "the actor died"
        return "the actor ended"

    async def stop(self, drain_s: float) -> None:
        """Drain, then end the actor."""
        with contextlib.suppress(RayError, TimeoutError):
            await asyncio.wait_for(self.handle.stop.remote(drain_s), drain_s + ANSWER_TIMEOUT_S)
        ray.kill(self.handle)


class ActorHost:
    """Starts worker actors of one cluster, or adopts those a former controller of it left running."""

    def __init__(
        self,
        cluster_id: str,
        lease_s: float,
        needs: Callable[[str], ActorNeeds],
        on_wait: Callable[[str, str], None] = lambda _worker_id, _reason: None,
    ) -> None:
        """`needs` says what a worker asks Ray for; `on_wait` hears for what one waits."""
        self._prefix = f"worker/{cluster_id}/"
        self._lease_s = lease_s
        self._needs = needs
        self._on_wait = on_wait
        self._live: dict[str, HostedActor] = {}
        self._waiting: dict[str, float] = {}  # worker id -> since when Ray has not placed it
        self._orphans: dict[str, str] = {}  # worker id -> actor name

    def find_orphans(self, members: Collection[str]) -> None:
        """Look for actors of this cluster that run already: `start` adopts members, the others are ended."""
        for actor in ray.util.list_named_actors(all_namespaces=True):
            name = str(actor["name"])
            if actor["namespace"] == NAMESPACE and name.startswith(self._prefix):
                worker_id = name.removeprefix(self._prefix).rsplit("/", 1)[0]
                if worker_id in members:
                    self._orphans[worker_id] = name
                else:
                    with contextlib.suppress(ValueError):
                        ray.kill(ray.get_actor(name, namespace=NAMESPACE))

    def waiting(self, for_s: float) -> set[str]:
        """Workers that Ray has not placed for so long."""
        now = time.monotonic()
        return {worker_id for worker_id, since in self._waiting.items() if now - since >= for_s}

    async def start(self, settings: WorkerSettings) -> HostedActor:
        """Returns when the worker takes requests. Raises StartError."""
        orphan = self._orphans.pop(settings.worker_id, None)
        hosted = await self._adopt(orphan) if orphan is not None else None
        if hosted is None:
            hosted = await self._create(settings)
        self._live[settings.worker_id] = hosted
        return hosted

    def renew(self) -> None:
        """Tell every worker that its controller lives. Answers are not waited for."""
        for hosted in self._live.values():
            hosted.handle.renew.remote()

    async def _adopt(self, name: str) -> HostedActor | None:
        try:
            handle = ray.get_actor(name, namespace=NAMESPACE)
            facts: dict[str, object] = await asyncio.wait_for(handle.describe.remote(), ANSWER_TIMEOUT_S)
        except (ValueError, RayError, TimeoutError):
            return None
        if not facts:  # it was still starting when its controller died
            ray.kill(handle)
            return None
        log.info("adopted %s", name)
        return HostedActor(handle, facts)

    async def _create(self, settings: WorkerSettings) -> HostedActor:
        needs = self._needs(settings.worker_id)
        options = {
            **needs.options(settings.role),
            "name": f"{self._prefix}{settings.worker_id}/{settings.incarnation}",
            "namespace": NAMESPACE,
            "lifetime": "detached",
            "max_restarts": 0,
            "max_task_retries": 0,
        }
        handle: Any = ray.remote(WorkerActor).options(**options).remote(settings.to_json(), self._lease_s)
        renewal = asyncio.ensure_future(_renew_often(handle, self._lease_s))
        try:
            await self._placed(handle, settings, needs)
            facts = await asyncio.wait_for(handle.start.remote(), START_TIMEOUT_S)
        except (RayError, TimeoutError) as error:
            ray.kill(handle)
            raise StartError(f"worker {settings.worker_id} did not start: {_first_line(error)}") from error
        except asyncio.CancelledError:
            ray.kill(handle)
            raise
        finally:
            renewal.cancel()
        if "address" not in facts:
            ray.kill(handle)
            raise StartError(f"worker {settings.worker_id} did not start: {facts.get('message', 'no reason given')}")
        return HostedActor(handle, facts)

    async def _placed(self, handle: Any, settings: WorkerSettings, needs: ActorNeeds) -> None:
        """Returns once the actor's process is up; until then says what it waits for."""
        worker_id, up = settings.worker_id, asyncio.ensure_future(_answer(handle.renew.remote()))
        since = time.monotonic()
        try:
            while not up.done():
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(asyncio.shield(up), PLACED_WITHIN_S)
                    break
                self._waiting.setdefault(worker_id, since)
                self._on_wait(worker_id, await asyncio.to_thread(waiting_reason, needs.amounts(settings.role)))
            await up
        finally:
            up.cancel()
            self._waiting.pop(worker_id, None)


async def _answer(pending: Awaitable[Any]) -> Any:
    return await pending


def waiting_reason(amounts: Mapping[str, float]) -> str:
    """What a worker waits for, in words, from what Ray's nodes have at the moment."""
    wanted = ", ".join(f"{amount:g} {name}" for name, amount in amounts.items()) or "a process"
    free = ray.available_resources()  # type: ignore[no-untyped-call]
    if all(free.get(name, 0) >= amount for name, amount in amounts.items()):
        return f"waiting for its process ({wanted})"
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    fitting = [node for node in nodes if all(node.get(name, 0) >= amount for name, amount in amounts.items())]
    return f"waiting for {wanted}: {'all of it is in use' if fitting else 'no node has it'}"


async def _renew_often(handle: Any, lease_s: float) -> None:
    while True:
        await asyncio.sleep(lease_s / 5)
        handle.renew.remote()


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
