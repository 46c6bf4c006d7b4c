"""Hosts one worker inside a Ray actor: the same assembly as `process.py`, owned by the cluster's controller.

`cluster/actor_host.py` makes a detached Ray actor of the class; Ray itself is only asked for the node's address, where
the settings leave the worker's open. Calls are for control only: requests and tokens go over the worker's own gRPC
streams.

Fate: the process ends, and with it the actor, when the engine fails or when the controller has not renewed the lease
for `lease_s`: a worker whose cluster is gone must not stay behind. Nobody has to notice by asking: streams break, and
the pending call of `ended` fails.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from penstock.workers.assembly import Worker, build_worker
from penstock.workers.cores import take_cores
from penstock.workers.errors import PenstockError
from penstock.workers.logs import configure
from penstock.workers.process import EXIT_ENGINE_FAILED, EXIT_ORPHANED, SWITCH_INTERVAL_S
from penstock.workers.settings import WorkerSettings

log = logging.getLogger(__name__)

_WATCH_INTERVAL_S = 0.2


class WorkerActor:
    """One worker. All methods run on the actor's asyncio loop; none blocks it."""

    def __init__(self, settings_json: str, lease_s: float, leave: Callable[[int], NoReturn] = os._exit) -> None:
        self._settings = on_this_node(WorkerSettings.from_json(settings_json))
        self._lease_s = lease_s
        self._leave = leave
        self._renewed = time.monotonic()
        self._worker: Worker | None = None
        self._stopping = False
        configure(self._settings.logs, self._settings.worker_id)
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        take_normal_priority()
        threading.Thread(target=self._watch, name="fate", daemon=True).start()

    async def start(self) -> dict[str, object]:
        """Load and serve. The worker's facts with `address`, or `error` and `message` where it cannot start."""
        try:
            take_cores(self._settings.runner.cpus)
            worker = await asyncio.to_thread(build_worker, self._settings)
            await asyncio.to_thread(worker.start)
        except (PenstockError, OSError, ValueError) as error:
            return {"error": type(error).__name__, "message": str(error), "key": getattr(error, "key", None)}
        self._worker = worker
        return self._facts(worker)

    async def describe(self) -> dict[str, object]:
        """The facts again, for a controller that came back; empty while the worker does not serve."""
        return self._facts(self._worker) if self._worker is not None else {}

    async def renew(self) -> None:
        """The controller lives."""
        self._renewed = time.monotonic()

    async def ended(self) -> None:
        """Never returns: it fails when the actor is gone, and that is what the caller waits for."""
        await asyncio.Event().wait()

    async def stop(self, drain_s: float) -> None:
        """Let requests end within `drain_s`, then end the worker. The caller ends the actor."""
        self._stopping = True
        if self._worker is not None:
            await asyncio.to_thread(self._worker.stop, drain_s)

    def _facts(self, worker: Worker) -> dict[str, object]:
        facts = {"address": worker.address, "incarnation": self._settings.incarnation}
        return {**facts, **dataclasses.asdict(worker.facts)}

    def _watch(self) -> None:
        while True:
            worker = self._worker
            if worker is None:
                time.sleep(_WATCH_INTERVAL_S)
            elif worker.join(_WATCH_INTERVAL_S):
                if worker.failed and not self._stopping:
                    self._leave(EXIT_ENGINE_FAILED)
                time.sleep(_WATCH_INTERVAL_S)
            if time.monotonic() - self._renewed > self._lease_s:
                log.error("no sign of the controller for %.0f s; the worker ends", self._lease_s)
                self._leave(EXIT_ORPHANED)


def on_this_node(settings: WorkerSettings) -> WorkerSettings:
    """`settings` with the addresses that are left open filled in: those under which other nodes reach this one."""
    if settings.host and settings.transfer.host:
        return settings
    from ray.util import get_node_ip_address  # late: a worker with its addresses given needs no Ray

    address = str(get_node_ip_address())  # type: ignore[no-untyped-call]
    transfer = dataclasses.replace(settings.transfer, host=settings.transfer.host or address)
    return dataclasses.replace(settings, host=settings.host or address, transfer=transfer)


def take_normal_priority() -> None:
    """Undo the low priority that Ray gives to actors: workers are who serves. Needs the right to; goes on without."""
    with contextlib.suppress(PermissionError, ProcessLookupError):
        for thread in Path("/proc/self/task").iterdir():  # Linux keeps a priority per thread
            if os.getpriority(os.PRIO_PROCESS, int(thread.name)) > 0:
                os.setpriority(os.PRIO_PROCESS, int(thread.name), 0)
