"""Hosts workers as plain subprocesses of this one: `python -m penstock.workers.process`, without Ray.

`local.py` gives it to the supervisor. A worker of width K is K processes: rank 0 says where it gathers the others, they
are started then, and it says when all are ready. Each gets its settings as JSON on stdin and answers with JSON lines on
stdout, also when it cannot start; its log goes to `log_file` (None: our own stderr). All end by themselves when this
process dies. Must be used on one asyncio loop.

Invariant: a worker is gone when none of its processes is left.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from penstock.cluster.group_ranks import (
    Failure,
    end_in_words,
    failure_of,
    heard_from,
    is_ready,
    rank_settings,
    reason_of,
    start_timeout_s,
    until_done,
    weights_addresses,
)
from penstock.cluster.supervision import StartError
from penstock.workers.parallel.fence import EXIT_GROUP_LOST
from penstock.workers.settings import WorkerSettings

# Idle compute threads spin briefly, then leave the cores to RPC and transfer threads. numpy computes nothing large; it
# would start a thread per core as it is imported, and end a process that may not have them before it can say so.
_ENVIRONMENT = ("GOMP_SPINCOUNT=30000", "OPENBLAS_NUM_THREADS=1")
WORKER_COMMAND = ("/usr/bin/env", *_ENVIRONMENT, sys.executable, "-m", "penstock.workers.process")
START_TIMEOUT_S = 120.0
KILL_AFTER_S = 5.0  # beyond the drain time
FOLLOW_S = 1.0  # after rank 0, for the others; then they are killed
LEAD_S = 5.0  # after another rank, for rank 0, which has more to end
MAX_READY_LINE = 1 << 16


class WorkerProcess:
    """One running worker: a process, or one for each of its ranks."""

    def __init__(
        self, processes: Sequence[Process], settings: WorkerSettings, said: Sequence[Mapping[str, object]]
    ) -> None:
        """`said`: the ready line of each rank."""
        self.settings = settings
        self.address = str(said[0]["address"])
        self.weights_addresses = weights_addresses(said)
        self._processes = tuple(processes)

    @property
    def pids(self) -> tuple[int, ...]:
        """Of every rank, in order."""
        return tuple(process.pid for process in self._processes)

    @property
    def incarnation(self) -> int:
        """As it was told."""
        return self.settings.incarnation

    async def ended(self) -> str:
        """Returns once rank 0 is gone, and all others with it; says how each ended that did not follow another.

        A group that may go on without some of its ranks is rank 0's to end; its other ranks end rank 0 if it hangs.
        """
        waits = [asyncio.ensure_future(process.wait()) for process in self._processes]
        try:
            if not self.settings.group.may_outlive_ranks:
                await until_done(waits, 1)
                if not waits[0].done():  # at an orderly end the others are first, too
                    await until_done(waits[:1], 1, LEAD_S)
                if not waits[0].done():
                    self.signal(signal.SIGKILL)
            await waits[0]
            await until_done(waits, len(waits), FOLLOW_S)
            late = [not wait.done() for wait in waits]
            for rank, is_late in enumerate(late):
                if is_late:
                    self.signal(signal.SIGKILL, rank)
            codes = [await wait for wait in waits]
        finally:
            for wait in waits:
                wait.cancel()
        blameless = [is_late or code in (0, EXIT_GROUP_LOST) for is_late, code in zip(late, codes, strict=True)]
        return end_in_words([describe_exit(code) for code in codes], blameless)

    def signal(self, number: int, rank: int = 0) -> None:
        """Send a signal to one rank's process, if it still lives."""
        process = self._processes[rank]
        if process.returncode is None:
            process.send_signal(number)

    async def stop(self, drain_s: float) -> None:
        """SIGTERM to rank 0, which ends the others, and SIGKILL for who does not follow; without drain time at once."""
        if drain_s > 0:
            self.signal(signal.SIGTERM)
            waits = [asyncio.ensure_future(process.wait()) for process in self._processes]
            await until_done(waits, len(waits), drain_s + KILL_AFTER_S)
        await _kill(self._processes)


class SubprocessHost:
    """Starts workers. `command` replaces the plain worker process by one that tests have tampered with."""

    def __init__(self, log_file: Path | None = None, command: Sequence[str] = WORKER_COMMAND) -> None:
        self._log_file = log_file
        self._command = tuple(command)

    async def start(self, settings: WorkerSettings) -> WorkerProcess:
        """Returns when the worker is ready. Raises StartError with what a rank said, or the end of what it wrote."""
        settings = dataclasses.replace(settings, parent_pid=os.getpid())
        starting = _Start(settings, self._log_file, self._command)
        try:
            async with asyncio.timeout(start_timeout_s(settings, START_TIMEOUT_S)) as limit:
                said = await starting.run()
        except TimeoutError as error:
            await _kill(starting.processes)
            if not limit.expired():
                raise
            raise StartError(f"worker {settings.worker_id} did not start in time") from error
        except BaseException:
            await _kill(starting.processes)
            raise
        return WorkerProcess(starting.processes, settings, said)


class _Start:
    """One start of one worker: `processes` has begun ones, in order of rank, for whoever must end them."""

    def __init__(self, settings: WorkerSettings, log_file: Path | None, command: tuple[str, ...]) -> None:
        self.processes: list[Process] = []
        self._settings = settings
        self._log_file = log_file
        self._command = command
        self._begin = log_file.stat().st_size if log_file is not None and log_file.exists() else 0

    async def run(self) -> list[dict[str, object]]:
        """Start every rank; their ready lines. Raises StartError."""
        leader = await self._begin_rank(0, "")
        if self._settings.group.width > 1:
            said = await self._heard(0, leader)
            if "group_address" not in said:
                raise self._error([await self._failure(0, said)])
            for rank in range(1, self._settings.group.width):
                await self._begin_rank(rank, str(said["group_address"]))
        return await self._ready_lines()

    async def _begin_rank(self, rank: int, leader: str) -> Process:
        """Start the process of one rank and hand over its settings."""
        log: IO[bytes] | None = self._log_file.open("ab") if self._log_file is not None else None
        try:
            process = await asyncio.create_subprocess_exec(*self._command, stdin=PIPE, stdout=PIPE, stderr=log)
        finally:
            if log is not None:
                log.close()
        self.processes.append(process)
        if process.stdin is None:
            raise StartError("the worker process has no pipes")
        settings = rank_settings(self._settings, rank, leader)
        if settings.group.width > 1 and settings.runner.device == "cuda":  # all see all GPUs; each takes its own
            settings = dataclasses.replace(settings, runner=dataclasses.replace(settings.runner, device=f"cuda:{rank}"))
        process.stdin.write(settings.to_json().encode() + b"\n")
        process.stdin.close()
        return process

    async def _ready_lines(self) -> list[dict[str, object]]:
        """Every rank's ready line."""
        hearing = [asyncio.ensure_future(self._heard(rank, each)) for rank, each in enumerate(self.processes)]
        said = await heard_from(hearing)
        failures = [await self._failure(rank, line) for rank, line in said.items() if not is_ready(line)]
        if failures:
            raise self._error(failures)
        return [said[rank] for rank in range(len(hearing))]

    async def _heard(self, rank: int, process: Process) -> dict[str, object]:
        """The next line of a rank; empty at its end."""
        if process.stdout is None:
            raise StartError(f"rank {rank} has no pipes")
        line = await process.stdout.readline()
        return dict(json.loads(line)) if line else {}

    async def _failure(self, rank: int, said: dict[str, object]) -> Failure:
        """Why a rank did not start: its own words, or how it ended and the last line of the log."""
        if said:
            return failure_of(rank, said)
        return Failure(rank, f"{describe_exit(await self.processes[rank].wait())}{self._tail()}")

    def _error(self, failures: list[Failure]) -> StartError:
        reason = reason_of(failures, self._settings.group.width)
        return StartError(f"worker {self._settings.worker_id} did not start: {reason}")

    def _tail(self) -> str:
        """The last line that was logged since the start."""
        if self._log_file is None:
            return ""
        with self._log_file.open("rb") as log:
            log.seek(self._begin)
            lines = log.read()[-MAX_READY_LINE:].decode(errors="replace").strip().splitlines()
        return f": {lines[-1]}" if lines else ""


async def _kill(processes: Sequence[Process]) -> None:
    """End what still lives; returns when all are gone."""
    for process in processes:
        if process.returncode is None:
            process.kill()
    for process in processes:
        await process.wait()


def describe_exit(code: int) -> str:
    """An exit status in words."""
    if code >= 0:
        return f"exited with status {code}"
    try:
        return f"ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"ended by signal {-code}"
