"""Whole workers as threads of this process, and a generator over them: everything of a cluster but its processes.

The exactness tests use it where hundreds of clusters are started: torch is imported once, and what every worker really
did (steps, transfers, preemptions) can be looked at. Workers are built by the product's own assembly and talk gRPC
and KV transfer over loopback as they do between processes.
"""

from __future__ import annotations

import asyncio
import dataclasses
import gc
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any
from unittest import mock

import numpy as np

from penstock.cluster.generation import Generator, open_generator
from penstock.cluster.roster import Roster, RosterEntry, WorkerState
from penstock.router.emission import TokenLogprob
from penstock.router.journey import RequestReport
from penstock.router.settings import RouterSettings
from penstock.workers import assembly
from penstock.workers.assembly import Worker, build_worker
from penstock.workers.kv.layout import KVLayout
from penstock.workers.kv.storage import KVStorage
from penstock.workers.protocol import GenerateRequest
from penstock.workers.scheduler.plan import Runner, StartStep, StepPlan, StepResult
from penstock.workers.scheduler.scheduler import Scheduler
from penstock.workers.settings import WorkerSettings
from penstock.workers.transfer.endpoint import TransferCounters

OnPlan = Callable[["HostedWorker", StepPlan], None]


@dataclasses.dataclass
class Answer:
    """What one request got."""

    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[TokenLogprob] = dataclasses.field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()
    cached_tokens: int = 0


class HostedWorker:
    """One worker with its runner watched; stands in for the runner."""

    def __init__(self, settings: WorkerSettings, on_plan: OnPlan | None = None) -> None:
        self.settings = settings
        self.longest_chunk = 0  # most prompt tokens of one sequence in one step
        self.chunk_tokens = 0  # tokens computed in rows that are no decodes
        self.widest_step = 0  # most tokens in one step
        self.steps = 0
        self.planned_ahead = 0  # of these steps
        self.storage: KVStorage
        self.transfers: TransferCounters
        self.preemptions = 0
        self._inner: Runner
        self._start_inner: StartStep | None
        self._on_plan = on_plan
        build_runner = assembly.build_computing

        def watched(given: WorkerSettings) -> Any:
            found = build_runner(given)
            self._inner, self.storage = found.runner, found.storage
            self._start_inner = found.start
            return dataclasses.replace(found, runner=self, start=found.start and self.start)

        with mock.patch.object(assembly, "build_computing", watched):
            self.worker: Worker = build_worker(settings)

    @property
    def layout(self) -> KVLayout:
        return self._inner.layout

    @property
    def vocab_size(self) -> int:
        return self._inner.vocab_size

    def run(self, plan: StepPlan) -> StepResult:
        self._watch(plan)
        return self._inner.run(plan)

    def start(self, plan: StepPlan) -> Callable[[], StepResult]:
        self._watch(plan)
        self.planned_ahead += plan.follows
        assert self._start_inner is not None
        return self._start_inner(plan)

    def _watch(self, plan: StepPlan) -> None:
        chunks = np.diff(plan.offsets)[plan.num_decode :]
        self.steps += 1
        self.widest_step = max(self.widest_step, plan.num_tokens)
        self.longest_chunk = max(self.longest_chunk, int(chunks.max(initial=0)))
        self.chunk_tokens += int(chunks.sum())
        if self._on_plan is not None:
            self._on_plan(self, plan)

    @property
    def idle(self) -> bool:
        """Nothing runs, waits, or is being moved."""
        load = self.worker._engine.load()
        return load.running + load.waiting + load.transfers + load.quarantined_blocks == 0

    def end(self) -> None:
        """Stop; every block must be back."""
        self.worker.stop()
        scheduler: Scheduler = self.worker._engine._scheduler
        pool = scheduler._memory.banks[0].pool
        self.transfers = self.worker._transfer.stats()
        self.preemptions = scheduler.stats().preemptions
        try:
            scheduler.check_integrity()
            if pool.num_free != pool.num_blocks:
                raise AssertionError(f"{pool.num_blocks - pool.num_free} blocks of {self.settings.worker_id} are lost")
        finally:
            self.storage.close()


class ThreadedCluster:
    """An async context manager. After it, `workers` hold what happened."""

    def __init__(
        self, workers: Sequence[WorkerSettings], router: RouterSettings, on_plan: OnPlan | None = None
    ) -> None:
        self._settings = workers
        self._router = router
        self._on_plan = on_plan
        self.workers: dict[str, HostedWorker] = {}
        self.reports: list[RequestReport] = []
        self.generator: Generator

    async def __aenter__(self) -> ThreadedCluster:
        entries = []
        for settings in self._settings:
            hosted = HostedWorker(settings, self._on_plan)
            self.workers[settings.worker_id] = hosted
            address = hosted.worker.start()
            entries.append(RosterEntry(settings.worker_id, settings.role, 1, 1, WorkerState.READY, address))
        self.generator = open_generator(self._router, self._settings[0].cluster_key, observe=self.reports.append)
        self.generator.links.update(Roster(1, tuple(entries)))
        if not await self.generator.links.wait_attached(20.0):
            raise AssertionError("the workers do not answer")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            await self._until_idle()
        await self.generator.close()
        for hosted in self.workers.values():
            hosted.end()
        gc.unfreeze()  # workers freeze what is loaded when they start; here they come and go

    async def generate(self, requests: Sequence[GenerateRequest]) -> list[Answer]:
        """Answers of requests that are sent together, in their order."""
        return list(await asyncio.gather(*(self._one(request) for request in requests)))

    async def _until_idle(self, timeout_s: float = 10.0) -> None:
        for _ in range(int(timeout_s / 0.01)):
            if all(hosted.idle for hosted in self.workers.values()):
                return
            await asyncio.sleep(0.01)
        raise AssertionError("something is left after the last answer")

    async def _one(self, request: GenerateRequest) -> Answer:
        answer = Answer()
        generation = self.generator.submit(request)
        async for delta in generation:
            answer.tokens += delta.tokens
            answer.logprobs += delta.logprobs or ()
        answer.prompt_logprobs = generation.prompt_logprobs
        answer.cached_tokens = generation.cached_tokens
        return answer
