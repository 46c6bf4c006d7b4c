"""A tensor-parallel group inside one process: every rank a thread with a runner and KV blocks of its own.

`GroupedRunner` stands where `fakes.in_process.InProcessWorker` wants a runner: rank 0 computes on the caller's thread,
and the others get every plan as rank 0 does. Ranks meet over Gloo on the loopback interface, as processes do.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from penstock.workers.kv.storage import KVStorage
from penstock.workers.model_build import build_model_runner
from penstock.workers.parallel.collectives import Collectives
from penstock.workers.parallel.process_group import GroupPlace, join_store, open_group, serve_store
from penstock.workers.runner import ModelRunner
from penstock.workers.scheduler.plan import StepPlan, StepResult
from penstock.workers.settings import KVSettings, RunnerSettings, SchedulerSettings

TIMEOUT_S = 30.0
_NAMES = itertools.count()


class RankThreads:
    """One thread and one `Collectives` for each rank of a group."""

    def __init__(self, width: int, timeout_s: float = TIMEOUT_S, *, share_memory: bool = True) -> None:
        self.width = width
        self._threads = [ThreadPoolExecutor(1, f"rank-{rank}") for rank in range(width)]
        self._store, address = serve_store("127.0.0.1", timeout_s)
        name = f"threads-{next(_NAMES)}"
        places = [
            GroupPlace(name, rank, width, timeout_s=timeout_s, share_memory=share_memory) for rank in range(width)
        ]

        def meet(rank: int) -> Collectives:  # a client of a store serves one thread at a time
            return open_group(places[rank], join_store(address, timeout_s) if rank else self._store)

        self.groups: list[Collectives] = self.each(meet)

    def start(self, rank: int, work: Callable[[], Any]) -> Future[Any]:
        return self._threads[rank].submit(work)

    def each(self, work: Callable[[int], Any]) -> list[Any]:
        """`work(rank)` on every rank at the same time; the results, or the first error."""
        running = [self.start(rank, lambda rank=rank: work(rank)) for rank in range(self.width)]
        return [each.result(TIMEOUT_S) for each in running]

    def all(self, work: Callable[[Collectives], Any]) -> list[Any]:
        """The same with each rank's collectives."""
        return self.each(lambda rank: work(self.groups[rank]))

    def close(self) -> None:
        for group in self.groups:
            group.close()
        for thread in self._threads:
            thread.shutdown()

    def __enter__(self) -> RankThreads:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class GroupedRunner:
    """The runners of all ranks as one. `limits` as for `fakes.in_process.load_runner`."""

    def __init__(self, model_dir: Path, width: int, *, dtype: str = "float32", threads: int = 1, **limits: int) -> None:
        limits = {"max_num_batched_tokens": 1 << 15, **limits}
        kv, scheduler = KVSettings(block_size=limits.pop("block_size", 16)), SchedulerSettings(**limits)
        settings = RunnerSettings(model_dir=str(model_dir), dtype=dtype, threads=threads)
        self.ranks = RankThreads(width)
        self.runners: list[ModelRunner] = self.ranks.all(
            lambda group: build_model_runner(settings, kv, scheduler, group=group)
        )
        self.storages: list[KVStorage] = []
        self._lent: list[KVStorage] = []

    @property
    def layout(self) -> Any:
        return self.runners[0].layout

    @property
    def vocab_size(self) -> int:
        return self.runners[0].vocab_size

    @property
    def device(self) -> Any:
        return self.runners[0].device

    def attach(self, storage: KVStorage) -> None:
        """`storage` for rank 0, others of as many blocks for the rest."""
        self._give_back()
        self._lent = [KVStorage.create(storage.num_blocks, runner.layout.block_bytes) for runner in self.runners[1:]]
        self.storages = [storage, *self._lent]
        for runner, own in zip(self.runners, self.storages, strict=True):
            runner.attach(own)

    def run(self, plan: StepPlan) -> StepResult:
        results: list[StepResult] = self.ranks.each(lambda rank: self.runners[rank].run(plan))
        if any(len(result.token_ids) or result.logprobs is not None for result in results[1:]):
            raise RuntimeError("a rank other than 0 sampled")
        return results[0]

    def close(self) -> None:
        self._give_back()
        self.ranks.close()

    def _give_back(self) -> None:
        for runner in self.runners:
            runner.detach()
        for storage in self._lent:
            storage.close()
        self._lent = []

    def __enter__(self) -> GroupedRunner:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
