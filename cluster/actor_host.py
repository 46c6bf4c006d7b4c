"""Hosts workers as detached Ray actors: the controller's way to start, find again, renew and end them.

The controller gives it to the supervisor. Actors are detached, so that they outlive a controller that Ray restarts,
and leased, so that they do not outlive the cluster. Knows nothing of what a worker does.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Mapping
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError

from penstock.cluster.supervision import StartError
from penstock.workers.actor import WorkerActor
from penstock.workers.settings import WorkerSettings

log = logging.getLogger(__name__)

NAMESPACE = "penstock"
START_TIMEOUT_S = 600.0  # a large checkpoint from a slow disk
ANSWER_TIMEOUT_S = 5.0


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
            return str(error).strip().splitlines()[0] if str(error) else "the actor died"
        return "the actor ended"

    async def stop(self, drain_s: float) -> None:
        """Drain, then end the actor."""
        with contextlib.suppress(RayError, TimeoutError):
            await asyncio.wait_for(self.handle.stop.remote(drain_s), drain_s + ANSWER_TIMEOUT_S)
        ray.kill(self.handle)


class ActorHost:
    """Starts worker actors of one cluster, or adopts those a former controller of it left running."""

    def __init__(self, cluster_id: str, num_cpus: float, lease_s: float) -> None:
        self._prefix = f"worker/{cluster_id}/"
        self._num_cpus = num_cpus
        self._lease_s = lease_s
        self._live: dict[str, HostedActor] = {}
        self._orphans: dict[str, str] = {}  # worker id -> actor name

    def find_orphans(self) -> None:
        """Look for actors of this cluster that run already; `start` adopts them."""
        for actor in ray.util.list_named_actors(all_namespaces=True):
            name = str(actor["name"])
            if actor["namespace"] == NAMESPACE and name.startswith(self._prefix):
                worker_id = name.removeprefix(self._prefix).rsplit("/", 1)[0]
                self._orphans[worker_id] = name

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
        options = {
            "name": f"{self._prefix}{settings.worker_id}/{settings.incarnation}",
            "namespace": NAMESPACE,
            "lifetime": "detached",
            "num_cpus": self._num_cpus,
            "max_restarts": 0,
            "max_task_retries": 0,
        }
        handle: Any = ray.remote(WorkerActor).options(**options).remote(settings.to_json(), self._lease_s)
        renewal = asyncio.ensure_future(_renew_often(handle, self._lease_s))
        try:
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


async def _renew_often(handle: Any, lease_s: float) -> None:
    while True:
        await asyncio.sleep(lease_s / 5)
        handle.renew.remote()


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
