"""A group of ranks as real processes: started by hand for single tests, or by a supervisor as one worker.

`GroupHost` is a `Host`: one hosted worker is all ranks of a group, and the worker is gone as soon as one of them is.
Every rank's exit code is kept, so that a test can say who ended how.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import signal
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from penstock.cluster.subprocess_host import describe_exit
from penstock.cluster.supervision import StartError
from penstock.workers.settings import GroupSettings, WorkerSettings

COMMAND = (sys.executable, "-m", "penstock.workers.process")
START_TIMEOUT_S = 60.0


def in_group(settings: WorkerSettings, tensor_parallel_size: int, **changed: Any) -> WorkerSettings:
    """The settings of rank 0 of a group."""
    group = GroupSettings(tensor_parallel_size=tensor_parallel_size, start_timeout_s=30.0, **changed)
    return dataclasses.replace(settings, group=group, parent_pid=os.getpid())


class Rank:
    """One rank's process, started with what it reads on stdin."""

    def __init__(self, process: Process) -> None:
        self.process = process

    @staticmethod
    async def start(settings: WorkerSettings, log_file: Path | None, command: Sequence[str] = COMMAND) -> Rank:
        log = log_file.open("ab") if log_file is not None else None
        try:
            process = await asyncio.create_subprocess_exec(*command, stdin=PIPE, stdout=PIPE, stderr=log)
        finally:
            if log is not None:
                log.close()
        assert process.stdin is not None
        process.stdin.write(settings.to_json().encode() + b"\n")
        process.stdin.close()
        return Rank(process)

    @property
    def pid(self) -> int:
        return self.process.pid

    async def says(self) -> dict[str, Any]:
        """Its next line; empty at its end."""
        assert self.process.stdout is not None
        line = await asyncio.wait_for(self.process.stdout.readline(), START_TIMEOUT_S)
        return dict(json.loads(line)) if line else {}

    async def ends(self, timeout_s: float = 10.0) -> int:
        return await asyncio.wait_for(self.process.wait(), timeout_s)

    def signal(self, number: int) -> None:
        if self.process.returncode is None:
            self.process.send_signal(number)


class HostedGroup:
    """All ranks of one group. `codes` are their exit codes once it is over."""

    def __init__(self, settings: WorkerSettings, ranks: list[Rank], facts: dict[str, Any]) -> None:
        self.settings = settings
        self.ranks = ranks
        self.facts = facts
        self.codes: list[int] = []
        self.over = asyncio.Event()
        self.first_end = self.last_end = 0.0  # time.monotonic() when the first and the last rank ended by itself

    @property
    def address(self) -> str:
        return str(self.facts["address"])

    @property
    def pids(self) -> tuple[int, ...]:
        return tuple(rank.pid for rank in self.ranks)

    @property
    def weights_addresses(self) -> tuple[str, ...]:
        return ()

    @property
    def incarnation(self) -> int:
        return self.settings.incarnation

    async def ended(self) -> str:
        """Once one rank is gone, the others must follow by themselves; those that do not are what the test is after."""
        waits = [asyncio.ensure_future(rank.process.wait()) for rank in self.ranks]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        self.first_end = time.monotonic()
        _, late = await asyncio.wait(waits, timeout=5.0)
        self.last_end = time.monotonic()
        for rank in self.ranks:
            rank.signal(signal.SIGKILL)
        self.codes = [await rank.process.wait() for rank in self.ranks]
        self.over.set()
        ends = ", ".join(f"rank {rank} {describe_exit(code)}" for rank, code in enumerate(self.codes))
        return f"{ends}; {len(late)} had to be killed"

    async def stop(self, drain_s: float) -> None:
        for rank in self.ranks:
            rank.signal(signal.SIGTERM if drain_s > 0 else signal.SIGKILL)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.gather(*(rank.process.wait() for rank in self.ranks)), drain_s + 5.0)
        for rank in self.ranks:
            rank.signal(signal.SIGKILL)
        self.codes = [await rank.process.wait() for rank in self.ranks]


class GroupHost:
    """Starts a worker as all its ranks. `commands` replaces some ranks' command in the first incarnation."""

    def __init__(self, log_file: Path | None = None, commands: dict[int, Sequence[str]] | None = None) -> None:
        self._log_file = log_file
        self._commands = commands or {}
        self.hosted: list[HostedGroup] = []  # every life of every group

    async def start(self, settings: WorkerSettings) -> HostedGroup:
        settings = dataclasses.replace(settings, parent_pid=os.getpid())
        commands = self._commands if settings.incarnation == 1 and settings.group.width > 1 else {}
        ranks = [await Rank.start(settings, self._log_file, commands.get(0, COMMAND))]
        try:
            leader = (await ranks[0].says()).get("group_address", "") if settings.group.width > 1 else ""
            for number in range(1, settings.group.width):
                follower = rank_settings(settings, number, str(leader))
                ranks.append(await Rank.start(follower, self._log_file, commands.get(number, COMMAND)))
            facts = await ranks[0].says()
            joined = [await rank.says() for rank in ranks[1:]]
        except BaseException:
            for rank in ranks:
                rank.signal(signal.SIGKILL)
                await rank.process.wait()
            raise
        if "address" not in facts or not all(each.get("joined") for each in joined):
            for rank in ranks:
                rank.signal(signal.SIGKILL)
                await rank.process.wait()
            raise StartError(f"group {settings.worker_id} did not start: {facts} {joined}")
        self.hosted.append(HostedGroup(settings, ranks, facts))
        return self.hosted[-1]


def rank_settings(settings: WorkerSettings, rank: int, leader: str) -> WorkerSettings:
    """The same for another rank."""
    return dataclasses.replace(settings, group=dataclasses.replace(settings.group, rank=rank, leader=leader))
