"""The one controller of a cluster: a detached Ray actor that owns the worker actors.

`launch.py` creates it and keeps its lease; ingress processes watch it for the roster. It restarts workers that die,
tells them every few seconds that it lives, and ends everything when the launcher is gone for good. When Ray restarts
it after a crash it finds its workers again; no worker notices. It is on no request's path: without it running streams
go on, only restarts wait.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray

from penstock.cluster.actor_host import NAMESPACE, ActorHost, HostedActor
from penstock.cluster.roster import Roster
from penstock.cluster.supervision import Backoff, StartError, Supervisor
from penstock.workers.settings import WorkerSettings

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ControllerSpec:
    """What a controller is made of; Ray hands the same one to its restarts."""

    cluster_id: str
    workers: tuple[str, ...]  # WorkerSettings as JSON
    worker_num_cpus: float
    app_name: str  # the Serve application to delete when the cluster ends by itself
    worker_lease_s: float = 30.0  # workers end after so long without their controller
    launcher_lease_s: float = 20.0  # the cluster ends after so long without its launcher
    stop_drain_s: float = 5.0


class Controller:
    """See the module's docstring; all methods run on the actor's one asyncio loop."""

    def __init__(self, spec: ControllerSpec) -> None:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s controller %(name)s: %(message)s")
        self._spec = spec
        self._host = ActorHost(spec.cluster_id, spec.worker_num_cpus, spec.worker_lease_s)
        settings: Sequence[WorkerSettings] = [WorkerSettings.from_json(text) for text in spec.workers]
        # Versions and incarnations must grow over a restart of this actor, which remembers nothing: they count from
        # the wall clock then.
        version = int(time.time() * 1000)
        again = ray.get_runtime_context().was_current_actor_reconstructed
        if again:
            self._host.find_orphans()
            settings = [replace(one, incarnation=int(time.time())) for one in settings]
        self._supervisor = Supervisor(self._host, settings, backoff=Backoff(), first_version=version)
        self._strict = not again  # one that comes back serves with whoever it finds
        self._renewed = time.monotonic()
        self._boot: asyncio.Task[Roster] | None = None
        self._life: asyncio.Task[None] | None = None

    async def ready(self) -> list[dict[str, object]]:
        """Every worker's facts once all of them serve; one entry with `error` when one cannot."""
        try:
            await asyncio.shield(self._begin())
        except StartError as error:
            return [{"error": str(error)}]
        hosted = [self._supervisor.hosted(entry.worker_id) for entry in self._supervisor.roster.entries]
        return [one.facts for one in hosted if isinstance(one, HostedActor)]

    async def watch(self, version: int, timeout_s: float) -> Roster:
        """The roster once it is newer than `version`, or as it is after `timeout_s`."""
        self._begin()
        return await self._supervisor.watch(version, timeout_s)

    async def renew(self) -> None:
        """The launcher lives."""
        self._begin()
        self._renewed = time.monotonic()

    async def stop(self, drain_s: float) -> None:
        """End every worker. The caller ends this actor."""
        if self._life is not None:
            self._life.cancel()
        if self._boot is not None and not self._boot.done():
            self._boot.cancel()
            await asyncio.gather(self._boot, return_exceptions=True)
        await self._supervisor.stop(drain_s)

    def _begin(self) -> asyncio.Task[Roster]:
        """Start the workers once; every call leads here, because a restarted actor is told nothing."""
        if self._boot is None:
            self._boot = asyncio.ensure_future(self._supervisor.start(self._strict))
            self._boot.add_done_callback(_note_failure)
            self._life = asyncio.ensure_future(self._live())
        return self._boot

    async def _live(self) -> None:
        """Renew the workers' leases; end it all when nobody renews ours."""
        while time.monotonic() - self._renewed < self._spec.launcher_lease_s:
            self._host.renew()
            await asyncio.sleep(min(self._spec.worker_lease_s / 6, self._spec.launcher_lease_s / 4))
        log.error("no sign of the launcher for %.0f s; the cluster ends", self._spec.launcher_lease_s)
        await self._supervisor.stop(self._spec.stop_drain_s)
        from ray import serve  # late: slow to import, and only needed here

        await asyncio.to_thread(serve.delete, self._spec.app_name, False)
        ray.kill(ray.get_runtime_context().current_actor, no_restart=True)


def _note_failure(boot: asyncio.Task[Roster]) -> None:
    if not boot.cancelled() and boot.exception() is not None:
        log.error("the cluster did not start: %s", boot.exception())


def controller_name(cluster_id: str) -> str:
    """The controller's name in Ray, in `NAMESPACE`."""
    return f"controller/{cluster_id}"


def create_controller(spec: ControllerSpec) -> Any:
    """Start the controller of a new cluster."""
    options = {
        "name": controller_name(spec.cluster_id),
        "namespace": NAMESPACE,
        "lifetime": "detached",
        "num_cpus": 0.01,
        "max_restarts": -1,
        "max_concurrency": 1000,  # every ingress keeps one `watch` pending
    }
    return ray.remote(Controller).options(**options).remote(spec)
