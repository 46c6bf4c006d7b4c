"""A host of workers that are objects of this process, for the supervisor and the controller."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from penstock.cluster.supervision import StartError
from penstock.workers.settings import WorkerSettings


class FakeWorker:
    def __init__(self, settings: WorkerSettings) -> None:
        self.settings = settings
        self.address = f"host:{settings.worker_id}:{settings.incarnation}"
        self.pids = (settings.incarnation,)
        self.incarnation = settings.incarnation
        self.weights_addresses = (f"{settings.worker_id}:weights",)
        self.gone = asyncio.Event()
        self.drained_s: float | None = None

    async def ended(self) -> str:
        await self.gone.wait()
        return "crashed"

    async def stop(self, drain_s: float) -> None:
        self.drained_s = drain_s
        self.gone.set()


@dataclass
class FakeHost:
    start_s: float = 1.0
    started: list[tuple[float, str, int]] = field(default_factory=list)
    workers: list[FakeWorker] = field(default_factory=list)
    failing: set[str] = field(default_factory=set)

    async def start(self, settings: WorkerSettings) -> FakeWorker:
        self.started.append((asyncio.get_running_loop().time(), settings.worker_id, settings.incarnation))
        await asyncio.sleep(self.start_s)
        if settings.worker_id in self.failing:
            raise StartError(f"{settings.worker_id}: no such model")
        worker = FakeWorker(settings)
        self.workers.append(worker)
        return worker

    def alive(self) -> list[FakeWorker]:
        return [worker for worker in self.workers if not worker.gone.is_set()]
