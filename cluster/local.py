"""A whole cluster in and below this process, without Ray and HTTP: worker subprocesses and a generator over them.

Tests, fault injection and the "bare engine" side of benchmarks use it:

    async with LocalCluster(workers) as cluster:
        async for delta in cluster.generator.submit(request): ...

Workers are restarted when they die, as the controller does. After the block no process is left.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

from penstock.cluster.fleet_view import LinkedFleet
from penstock.cluster.generation import Generator, open_generator
from penstock.cluster.progress_watch import until_stuck
from penstock.cluster.subprocess_host import SubprocessHost, WorkerProcess
from penstock.cluster.supervision import Backoff, StartError, Supervisor
from penstock.router.journey import RequestReport
from penstock.router.settings import RouterSettings
from penstock.workers.settings import WorkerSettings
from penstock.workers.tls import open_peer_tls

ATTACH_TIMEOUT_S = 20.0


class LocalCluster:
    """An async context manager; must be used on one asyncio loop."""

    def __init__(
        self,
        workers: Sequence[WorkerSettings],
        router: RouterSettings | None = None,
        *,
        restart: bool = True,
        backoff: Backoff | None = None,
        log_file: Path | None = None,
        host: SubprocessHost | None = None,
        observe: Callable[[RequestReport], None] | None = None,
    ) -> None:
        self._workers = list(workers)
        self._router = router or RouterSettings()
        self._restart = restart
        self._backoff = backoff
        self._host = host or SubprocessHost(log_file)
        self._observe = observe
        self.generator: Generator
        self.fleet: LinkedFleet
        self.supervisor: Supervisor

    async def __aenter__(self) -> LocalCluster:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.stop()

    async def start(self) -> None:
        """Start all workers and attach to them. Raises StartError; then nothing is left running."""
        first = self._workers[0]
        self.generator = open_generator(
            self._router,
            first.cluster_key,
            lease_s=first.router_lease_s,
            observe=self._observe,
            tls=open_peer_tls(first.tls),
        )
        self.fleet = LinkedFleet(self.generator.links)
        self.supervisor = Supervisor(
            self._host,
            self._workers,
            backoff=self._backoff,
            restart=self._restart,
            on_change=self.generator.links.update,
            until_stuck=until_stuck,
        )
        await self.supervisor.start()
        if not await self.generator.links.wait_attached(ATTACH_TIMEOUT_S):
            await self.stop()
            raise StartError("the workers run but do not answer")

    async def stop(self, drain_s: float = 0.0) -> None:
        """End everything; requests under way get `drain_s`."""
        if drain_s <= 0:
            await self.generator.close()
        await self.supervisor.stop(drain_s)
        await self.generator.close()

    def process(self, worker_id: str) -> WorkerProcess:
        """The running process of a worker. KeyError when it does not run at the moment."""
        hosted = self.supervisor.hosted(worker_id)
        if not isinstance(hosted, WorkerProcess):
            raise KeyError(worker_id)
        return hosted

    def kill(self, worker_id: str, rank: int = 0) -> int:
        """SIGKILL one rank's process of a worker, as a crash would; its pid."""
        process = self.process(worker_id)
        process.signal(signal.SIGKILL, rank)
        return process.pids[rank]

    async def wait_ready(self, timeout_s: float) -> bool:
        """True once every worker runs and is attached."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        while loop.time() < deadline:
            states = self.fleet.workers()
            if all(status.state == "ready" and status.age_s is not None for status in states):
                return True
            await asyncio.sleep(0.02)
        return False
