"""Hosts one worker, or one rank of it, inside a Ray actor: the same assembly as `process.py`, owned by the controller.

`cluster/actor_host.py` makes a detached Ray actor of the class, one for every rank of a group; Ray itself is only asked
for the node's address, where the settings leave the worker's open. Calls are for control only: requests and tokens go
over the worker's own gRPC streams, steps over the group's own channel.

Fate: the process ends, and with it the actor, when the engine fails, when its group ends or goes on without it, or when
the controller has not renewed the lease for `lease_s`: a worker whose cluster is gone must not stay behind. Nobody has
to notice by asking: streams break, and the pending call of `ended` fails.
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
from typing import NoReturn

from penstock.workers.assembly import Worker, build_worker
from penstock.workers.cores import take_cores
from penstock.workers.errors import PenstockError
from penstock.workers.group_assembly import build_follower
from penstock.workers.logs import configure
from penstock.workers.parallel.follower import Follower, FollowerParts
from penstock.workers.parallel.leader import GroupLeader
from penstock.workers.priority import take_normal_priority
from penstock.workers.process import EXIT_ENGINE_FAILED, EXIT_ORPHANED, SWITCH_INTERVAL_S
from penstock.workers.process_limits import take_limits
from penstock.workers.settings import WorkerSettings

log = logging.getLogger(__name__)

_WATCH_INTERVAL_S = 0.2


class WorkerActor:
    """One worker, or one rank of it. All methods run on the actor's asyncio loop; none blocks it."""

    def __init__(self, settings_json: str, lease_s: float, leave: Callable[[int], NoReturn] = os._exit) -> None:
        self._settings = on_this_node(WorkerSettings.from_json(settings_json))
        self._lease_s = lease_s
        self._leave = leave
        self._renewed = time.monotonic()
        self._leader: GroupLeader | None = None
        self._worker: Worker | None = None
        self._joined: FollowerParts | None = None  # as a rank above 0
        self._stopping = False
        configure(self._settings.logs, self._settings.title)
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        take_normal_priority()
        threading.Thread(target=self._watch, name="fate", daemon=True).start()

    async def lead(self) -> dict[str, object]:
        """On rank 0 of a group, before `start`: `group_address`, which the others need, or why there is none."""
        try:
            self._leader = await asyncio.to_thread(GroupLeader, self._settings, self._leave)
        except (PenstockError, OSError, ValueError) as error:
            return _why(error)
        return {"group_address": self._leader.address}

    async def start(self, leader: str = "") -> dict[str, object]:
        """Load and serve; on ranks above 0 with rank 0's `group_address`, to join it. Returns when all are ready.

        The worker's facts with `address`, or `joined` on ranks above 0; `error` and `message` where it cannot start.
        The caller ends an actor that could not: its start may still be under way.
        """
        group = dataclasses.replace(self._settings.group, leader=leader)
        self._settings = dataclasses.replace(self._settings, group=group)
        try:
            take_cores(self._settings.runner.cpus)
        except (PenstockError, OSError, ValueError) as error:
            return _why(error)
        problem = await self._built()
        return await self.describe() if problem is None else _why(problem)

    async def describe(self) -> dict[str, object]:
        """The facts again, for a controller that came back; empty while the worker, or this rank, does not serve."""
        if self._joined is not None:
            facts = {"joined": True, "pid": os.getpid(), "rank": self._settings.group.rank}
            served = {"weights_address": self._joined.weights_address}
            return {**facts, **served, "incarnation": self._settings.incarnation}
        return self._facts(self._worker) if self._worker is not None else {}

    async def renew(self) -> None:
        """The controller lives."""
        self._renewed = time.monotonic()

    async def ended(self) -> None:
        """Never returns: it fails when the actor is gone, and that is what the caller waits for."""
        await asyncio.Event().wait()

    async def stop(self, drain_s: float) -> None:
        """Let requests end within `drain_s`, then end the worker; its other ranks follow. The caller ends the actor."""
        self._stopping = True
        if self._worker is not None:
            await asyncio.to_thread(self._worker.stop, drain_s)

    async def _built(self) -> Exception | None:
        """Load in a thread; why it cannot start. Does not wait for that thread once another rank has failed."""
        loop = asyncio.get_running_loop()
        outcome: asyncio.Future[Exception | None] = loop.create_future()

        def settle(problem: Exception | None) -> None:
            if not outcome.done():
                outcome.set_result(problem)

        def finished(building: asyncio.Task[Exception | None]) -> None:
            defect = building.exception()
            if defect is None:
                settle(building.result())
            elif not outcome.done():
                outcome.set_exception(defect)

        def give_up(problem: Exception) -> None:
            loop.call_soon_threadsafe(settle, problem)

        building = asyncio.create_task(asyncio.to_thread(self._build, give_up))
        building.add_done_callback(finished)
        return await outcome

    def _build(self, give_up: Callable[[Exception], None]) -> Exception | None:
        """Load this worker or rank; why it cannot start. `give_up` hears, meanwhile, that another rank cannot."""
        leader = self._leader
        try:
            take_limits(self._settings.title)
            if self._settings.group.rank:
                self._follow(give_up)
                return None
            if leader is not None:
                leader.on_start_failure = give_up
            worker = build_worker(self._settings, leader)
            worker.start()
        except (PenstockError, OSError, ValueError) as error:
            if leader is not None:
                leader.abandon_start(error)
            return error
        self._worker = worker
        return None

    def _follow(self, give_up: Callable[[Exception], None]) -> None:
        """Join rank 0, load, and obey in a thread of its own until the end of this process."""
        follower = Follower(self._settings, self._leave)
        follower.on_start_failure = give_up
        try:
            parts = build_follower(self._settings, follower)
        except (PenstockError, OSError, ValueError) as error:
            follower.abandon_start(error)
            raise
        self._joined = parts

        def obey() -> None:
            code = follower.serve(parts)
            parts.transfer.stop()
            self._leave(code)

        threading.Thread(target=obey, name="follower", daemon=True).start()

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
                if self._settings.group.width > 1:
                    release_placement()
                self._leave(EXIT_ORPHANED)


def on_this_node(settings: WorkerSettings) -> WorkerSettings:
    """`settings` with the addresses that are left open filled in: those under which other nodes reach this one."""
    if settings.host and settings.transfer.host and settings.group.host:
        return settings
    from ray.util import get_node_ip_address  # late: a worker with its addresses given needs no Ray

    address = str(get_node_ip_address())  # type: ignore[no-untyped-call]
    transfer = dataclasses.replace(settings.transfer, host=settings.transfer.host or address)
    group = dataclasses.replace(settings.group, host=settings.group.host or address)
    return dataclasses.replace(settings, host=settings.host or address, transfer=transfer, group=group)


def release_placement() -> None:
    """Give back what this actor's placement group holds, when nobody else is left to do it; ends all its actors."""
    import ray
    from ray.exceptions import RayError

    if not ray.is_initialized():
        return
    with contextlib.suppress(RayError, RuntimeError, ValueError):
        group = ray.util.get_current_placement_group()
        if group is not None:
            ray.util.remove_placement_group(group)


def _why(error: Exception) -> dict[str, object]:
    return {"error": type(error).__name__, "message": str(error), "key": getattr(error, "key", None)}
