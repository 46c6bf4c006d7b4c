"""A worker of T x E ranks inside one process: E copies of the attention, each cut over T ranks, and experts over all.

`SpreadRunner` stands where `fakes.in_process.InProcessWorker` wants a runner, which then has a bank for every copy.
Rank r is tensor rank r mod T of expert rank r div T, as in production.
"""

from __future__ import annotations

import itertools
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from fakes.rank_threads import GroupedRunner

from penstock.workers.expert_ranks import ExpertRanks, ExpertSpread
from penstock.workers.kv.storage import KVStorage
from penstock.workers.model_build import build_model_runner
from penstock.workers.parallel.collectives import Collectives
from penstock.workers.parallel.process_group import GroupPlace, join_store, open_group, serve_store
from penstock.workers.parallel.shared_prompts import Banks
from penstock.workers.runner import ModelRunner
from penstock.workers.settings import KVSettings, RunnerSettings, SchedulerSettings

TIMEOUT_S = 30.0
_NAMES = itertools.count()


class _Threads:
    """One thread per rank, and the groups that they open."""

    def __init__(self, count: int) -> None:
        self.groups: list[Collectives] = []
        self._threads = [ThreadPoolExecutor(1, f"rank-{rank}") for rank in range(count)]

    def each(self, work: Any) -> list[Any]:
        """`work(rank)` on every rank at the same time; the results, or the first error."""
        running = [thread.submit(work, rank) for rank, thread in enumerate(self._threads)]
        wait(running, timeout=2 * TIMEOUT_S, return_when=FIRST_EXCEPTION)
        for each in running:  # the others wait for the one that failed
            if each.done() and each.exception() is not None:
                each.result()
        return [each.result(0) for each in running]

    def close(self) -> None:
        for group in self.groups:
            group.close()
        for thread in self._threads:
            thread.shutdown()


class SpreadRunner(GroupedRunner):
    """The runners of all ranks as one. `limits` go to SchedulerSettings."""

    def __init__(
        self,
        model_dir: Path,
        tensor: int,
        experts: int,
        spread: ExpertSpread | None = None,
        *,
        threshold: int = 0,
        **limits: int,
    ) -> None:
        """`threshold`: ranks share prompts from so many tokens on; `spread` None: and each has all experts."""
        self._tensor, self._experts = tensor, experts
        self._spread = spread
        self._threshold = threshold
        self._scratch = -(-limits["max_model_len"] // 16) if threshold else 0
        self._settings = RunnerSettings(model_dir=str(model_dir), dtype="float32", threads=1)
        self._scheduler = SchedulerSettings(**{"max_num_batched_tokens": 1 << 15, **limits})
        self._store, self._address = serve_store("127.0.0.1", TIMEOUT_S)
        self._name = f"spread-{next(_NAMES)}"
        self.ranks: Any = _Threads(tensor * experts)
        self.storages: list[KVStorage] = []
        self._lent: list[KVStorage] = []
        self.runners: list[ModelRunner] = self.ranks.each(self._load)

    def attach(self, storage: KVStorage) -> None:
        """Every rank gets blocks of its own: as many as `storage` has, and scratch behind them."""
        self._give_back()
        size = storage.num_blocks + self._scratch
        self.storages = self._lent = [KVStorage.create(size, runner.layout.block_bytes) for runner in self.runners]
        for runner, own in zip(self.runners, self.storages, strict=True):
            runner.attach(own)
            runner.use_banks(Banks(storage.num_blocks, self._scratch, self._threshold))

    def _load(self, rank: int) -> ModelRunner:
        expert_rank, tensor_rank = divmod(rank, self._tensor)
        tensor = self._open(f"tensor-{expert_rank}", tensor_rank, self._tensor)
        attention = self._open(f"attention-{tensor_rank}", expert_rank, self._experts)

        def meet(name: str, number: int, width: int, _beside: bool) -> Collectives:
            return self._open(f"{name}-{tensor_rank}", number, width)

        ranks = ExpertRanks(attention, meet, self._spread) if self._experts > 1 else None
        return build_model_runner(
            self._settings, KVSettings(block_size=16), self._scheduler, group=tensor, expert_ranks=ranks
        )

    def _open(self, name: str, rank: int, width: int) -> Collectives:
        place = GroupPlace(f"{self._name}/{name}", rank, width, timeout_s=TIMEOUT_S)
        # A client of a store serves one thread at a time.
        group = open_group(place, join_store(self._address, TIMEOUT_S) if width > 1 else None)
        self.ranks.groups.append(group)
        return group
