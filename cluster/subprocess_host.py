"""Hosts workers as plain subprocesses of this one: `python -m penstock.workers.process`, without Ray.

`local.py` gives it to the supervisor. A worker gets its settings as JSON on stdin and answers with one JSON line on
stdout when it takes requests, or when it cannot; its log goes to `log_file` (None: our own stderr). It ends by itself
when this process dies. Must be used on one asyncio loop.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from penstock.cluster.supervision import StartError
from penstock.workers.settings import WorkerSettings

# Idle compute threads spin briefly, then leave the cores to RPC and transfer threads.
WORKER_COMMAND = ("/usr/bin/env", "GOMP_SPINCOUNT=30000", sys.executable, "-m", "penstock.workers.process")
START_TIMEOUT_S = 120.0
KILL_AFTER_S = 5.0  # beyond the drain time
MAX_READY_LINE = 1 << 16


class WorkerProcess:
    """One running worker process."""

    def __init__(self, process: Process, settings: WorkerSettings, address: str) -> None:
        self.settings = settings
        self.address = address
        self._process = process

    @property
    def pids(self) -> tuple[int, ...]:
        """The one process."""
        return (self._process.pid,)

    @property
    def incarnation(self) -> int:
        """As it was told."""
        return self.settings.incarnation

    async def ended(self) -> str:
        """Returns once the process is gone."""
        return describe_exit(await self._process.wait())

    def signal(self, number: int) -> None:
        """Send a signal, if the process still lives."""
        if self._process.returncode is None:
            self._process.send_signal(number)

    async def stop(self, drain_s: float) -> None:
        """SIGTERM, and SIGKILL for one that does not follow. Without drain time it is killed at once."""
        self.signal(signal.SIGTERM if drain_s > 0 else signal.SIGKILL)
        try:
            await asyncio.wait_for(self._process.wait(), drain_s + KILL_AFTER_S)
        except TimeoutError:
            self.signal(signal.SIGKILL)
            await self._process.wait()


class SubprocessHost:
    """Starts worker processes. `command` replaces the plain worker by one that tests have tampered with."""

    def __init__(self, log_file: Path | None = None, command: Sequence[str] = WORKER_COMMAND) -> None:
        self._log_file = log_file
        self._command = tuple(command)

    async def start(self, settings: WorkerSettings) -> WorkerProcess:
        """Returns when the worker is ready. Raises StartError with the end of what it wrote."""
        settings = dataclasses.replace(settings, parent_pid=os.getpid())
        log: IO[bytes] | None = self._log_file.open("ab") if self._log_file is not None else None
        begin = log.tell() if log is not None else 0
        try:
            process = await asyncio.create_subprocess_exec(*self._command, stdin=PIPE, stdout=PIPE, stderr=log)
        finally:
            if log is not None:
                log.close()
        try:
            ready = await asyncio.wait_for(self._tell(process, settings), START_TIMEOUT_S)
        except BaseException:
            if process.returncode is None:
                process.kill()
            await process.wait()
            raise
        if "address" not in ready:
            end = describe_exit(await process.wait())
            reason = f"{ready['message']}" if "message" in ready else f"{end}{self._tail(begin)}"
            raise StartError(f"worker {settings.worker_id} did not start: {reason}")
        return WorkerProcess(process, settings, str(ready["address"]))

    async def _tell(self, process: Process, settings: WorkerSettings) -> dict[str, object]:
        """Hand over the settings; the ready line, empty if there is none."""
        if process.stdin is None or process.stdout is None:
            raise StartError("the worker process has no pipes")
        process.stdin.write(settings.to_json().encode() + b"\n")
        process.stdin.close()
        line = await process.stdout.readline()
        return dict(json.loads(line)) if line else {}

    def _tail(self, begin: int) -> str:
        """The last line that the worker logged since `begin`."""
        if self._log_file is None:
            return ""
        with self._log_file.open("rb") as log:
            log.seek(begin)
            lines = log.read()[-MAX_READY_LINE:].decode(errors="replace").strip().splitlines()
        return f": {lines[-1]}" if lines else ""


def describe_exit(code: int) -> str:
    """An exit status in words."""
    if code >= 0:
        return f"exited with status {code}"
    try:
        return f"ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"ended by signal {-code}"
