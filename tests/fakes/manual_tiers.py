"""The tiers of one pool with their threads turned by hand: what they do, they do when a test says so.

Over a `ContentRunner`, whose blocks show what they hold. Host and disk tier, spill and loads are the product's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from fakes.content_runner import ContentRunner

from penstock.workers.kv import spill, tiers
from penstock.workers.kv.disk_tier import DiskTier
from penstock.workers.kv.host_tier import HostTier
from penstock.workers.kv.storage import PoolBlocks
from penstock.workers.kv.tier_feed import TierChanges
from penstock.workers.kv.tiers import KVTiers


class ManualThread:
    """A `WorkThread` that does its next job in `work`."""

    def __init__(self, name: str, most_waiting: int) -> None:
        self.name = name
        self.jobs: list[tuple[Future[Any], Callable[[], Any]]] = []
        self._most = most_waiting

    def submit(self, job: Callable[[], Any]) -> Future[Any] | None:
        if len(self.jobs) >= self._most:
            return None
        future: Future[Any] = Future()
        self.jobs.append((future, job))
        return future

    def work(self) -> bool:
        """False: there was nothing to do."""
        if not self.jobs:
            return False
        future, job = self.jobs.pop(0)
        if future.set_running_or_notify_cancel():
            future.set_result(job())
        return True

    def stop(self, patience_s: float) -> None:
        self.jobs.clear()


class ContentPool:
    """A `BlockMover` over a runner's blocks."""

    frame_bytes = None
    segment = ""
    copies_on_device = False

    def __init__(self, runner: ContentRunner, generations: np.ndarray) -> None:
        data = runner.blocks.view(np.uint8)
        self.num_blocks, self.block_bytes = data.shape
        self.generations = generations
        self._bytes = memoryview(data.reshape(-1).data)

    def read(self, blocks: Sequence[int]) -> PoolBlocks:
        return PoolBlocks(self._bytes, self.block_bytes, blocks)

    land = read


class ManualTiers:
    """`tiers` over a runner's blocks, and their `threads`."""

    def __init__(
        self, runner: ContentRunner, generations: np.ndarray, host_blocks: int, disk: tuple[Path, int] | None
    ) -> None:
        """`disk`: directory and blocks."""
        pool = ContentPool(runner, generations)
        self.changes = TierChanges()
        self.threads: list[ManualThread] = []

        def thread(name: str, most_waiting: int) -> ManualThread:
            self.threads.append(ManualThread(name, most_waiting))
            return self.threads[-1]

        size = pool.block_bytes
        below = None
        if disk is not None:
            room = disk[1] * (size + 128)  # a segment's head included
            below = DiskTier(disk[0], "content", size, room, self.changes.note)
        with mock.patch.object(spill, "WorkThread", thread), mock.patch.object(tiers, "WorkThread", thread):
            host = HostTier(host_blocks * size, size)
            self.tiers = KVTiers(pool, host, below, self.changes, lambda: None)  # type: ignore[arg-type]

    def work(self, name: str) -> bool:
        """One job of one thread."""
        return next(thread for thread in self.threads if thread.name == name).work()

    def work_all(self) -> None:
        """Until none has anything to do."""
        while any(thread.work() for thread in self.threads):
            pass
