"""Keeps a set of workers running: desired against actual, restarts with back-off, a higher incarnation each time.

A worker that lives but stands still (`progress_watch.py`) is ended and counts as one that died.

The controller (Ray actors) and `local.py` (plain subprocesses) both use it, each with its own `Host`. Knows neither
Ray nor processes nor what a worker serves.

Workers may join and leave while it runs (`add`, `remove`).

Invariants: at most one live hosting per worker id; an incarnation is never used twice; the roster's version grows
with every change; after `stop` nothing runs and nothing is started.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from penstock.cluster.group_ranks import until_done
from penstock.cluster.roster import Roster, RosterEntry, WorkerState
from penstock.workers.errors import PenstockError
from penstock.workers.settings import WorkerSettings

log = logging.getLogger(__name__)


MOST_WEIGHT_PEERS = 32


class StartError(PenstockError):
    """A worker did not come up; the message says why in its own words."""


@dataclass(frozen=True, slots=True)
class Backoff:
    """How long a dead worker waits for its next start, and when its record is wiped clean."""

    first_s: float = 0.2
    factor: float = 2.0
    longest_s: float = 30.0
    healthy_after_s: float = 60.0  # a worker that lived so long starts again at `first_s`

    def delay(self, deaths: int) -> float:
        """Seconds before the next start after `deaths` deaths in a row (1 = the first)."""
        return float(min(self.longest_s, self.first_s * self.factor ** max(0, deaths - 1)))


class Hosted(Protocol):
    """One running worker, however it is hosted."""

    @property
    def address(self) -> str:
        """host:port of its RPC server."""
        ...

    @property
    def pids(self) -> tuple[int, ...]: ...

    @property
    def incarnation(self) -> int: ...

    @property
    def weights_addresses(self) -> tuple[str, ...]:
        """host:port of its ranks that give weights to workers that start."""
        ...

    async def ended(self) -> str:
        """Returns once it is gone, with the reason."""
        ...

    async def stop(self, drain_s: float) -> None:
        """Let running requests end for at most `drain_s`, then end it. Returns when it is gone."""
        ...


class Host(Protocol):
    """Starts workers."""

    async def start(self, settings: WorkerSettings) -> Hosted:
        """Returns when the worker takes requests. Raises StartError."""
        ...


class Supervisor:
    """One asyncio loop's view of the workers it owns."""

    def __init__(
        self,
        host: Host,
        workers: Sequence[WorkerSettings],
        *,
        backoff: Backoff | None = None,
        restart: bool = True,
        on_change: Callable[[Roster], None] | None = None,
        first_version: int = 0,
        until_stuck: Callable[[WorkerSettings, str], Awaitable[str]] | None = None,
    ) -> None:
        """`until_stuck(settings, address)` returns, with the reason, when a worker moves no more."""
        self._host = host
        self._backoff = backoff or Backoff()
        self._restart = restart
        self._on_change = on_change
        self._until_stuck = until_stuck
        self._settings = {settings.worker_id: settings for settings in workers}
        self._hosted: dict[str, Hosted] = {}
        self._entries = {settings.worker_id: _first_entry(settings) for settings in workers}
        self._version = first_version
        self._changed = asyncio.Event()
        self._tasks: dict[str, asyncio.Task[None]] = {}  # the keeper of each worker
        self._stopping = False
        self._peer_turn = 0  # starts so far that were told peers

    @property
    def roster(self) -> Roster:
        """The latest state."""
        return Roster(self._version, tuple(self._entries.values()))

    def hosted(self, worker_id: str) -> Hosted | None:
        """The running worker, if it runs."""
        return self._hosted.get(worker_id)

    async def start(self, strict: bool = True) -> Roster:
        """Start all workers at once, and return when each has come up or failed.

        `strict`: the first one that does not come up stops the others, and its StartError is raised. Otherwise it is
        tried again like one that died.
        """
        bring_up = self._bring_up if strict else self._try_bring_up
        starts = [asyncio.ensure_future(bring_up(worker_id)) for worker_id in self._settings]
        try:
            await asyncio.gather(*starts)
        except BaseException:
            for start in starts:
                start.cancel()
            await asyncio.gather(*starts, return_exceptions=True)
            await self.stop(0.0)
            raise
        self._tasks = {worker_id: asyncio.ensure_future(self._keep(worker_id)) for worker_id in self._settings}
        return self.roster

    def add(self, settings: WorkerSettings, edition: str = "") -> None:
        """Begin to keep one more worker. Returns at once; the roster tells how it gets on."""
        worker_id = settings.worker_id
        if self._stopping or worker_id in self._settings:
            return
        self._settings[worker_id] = settings
        self._entries[worker_id] = replace(_first_entry(settings), edition=edition)
        self._tell()
        self._tasks[worker_id] = asyncio.ensure_future(self._begin(worker_id))

    async def remove(self, worker_id: str, drain_s: float) -> None:
        """Let one worker go: nothing new is placed there from now on, what it runs gets `drain_s`, then it ends."""
        keeper = self._tasks.pop(worker_id, None)
        if keeper is None or self._stopping:
            return
        keeper.cancel()
        await asyncio.gather(keeper, return_exceptions=True)
        hosted = self._hosted.get(worker_id)
        self._update(worker_id, state=WorkerState.STOPPING, reason="")
        if hosted is not None:
            await asyncio.gather(hosted.stop(drain_s), return_exceptions=True)
        self._hosted.pop(worker_id, None)
        self._settings.pop(worker_id, None)
        if self._entries.pop(worker_id, None) is not None:
            self._tell()

    def note(self, worker_id: str, reason: str) -> None:
        """Say in the roster why a worker is not there yet."""
        entry = self._entries.get(worker_id)
        if entry is not None and entry.reason != reason and entry.state is not WorkerState.READY:
            self._update(worker_id, reason=reason)

    def note_placement(self, worker_id: str, words: str) -> None:
        """Say in the roster why a worker's ranks are not together; empty: they are."""
        entry = self._entries.get(worker_id)
        if entry is not None and entry.placement != words:
            self._update(worker_id, placement=words)

    async def watch(self, version: int, timeout_s: float) -> Roster:
        """The roster as soon as it is newer than `version`, or as it is after `timeout_s`."""
        if self._version <= version:
            changed = self._changed
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(changed.wait(), timeout_s)
        return self.roster

    async def stop(self, drain_s: float) -> None:
        """End every worker, all at once; running requests get `drain_s`."""
        self._stopping = True
        keepers = list(self._tasks.values())
        for task in keepers:
            task.cancel()
        await asyncio.gather(*keepers, return_exceptions=True)
        for worker_id in self._hosted:
            self._update(worker_id, state=WorkerState.STOPPING)
        await asyncio.gather(*(hosted.stop(drain_s) for hosted in self._hosted.values()), return_exceptions=True)
        self._hosted.clear()
        for worker_id in self._entries:
            self._update(worker_id, state=WorkerState.STOPPED, address="", pids=())

    async def _bring_up(self, worker_id: str) -> None:
        """Start one worker and enter it. Raises StartError."""
        peers = self._weight_peers(worker_id)
        hosted = await self._host.start(replace(self._settings[worker_id], weight_peers=peers))
        if self._stopping:  # `stop` may have run while this start was under way
            await hosted.stop(0.0)
            return
        self._hosted[worker_id] = hosted
        self._update(
            worker_id,
            state=WorkerState.READY,
            address=hosted.address,
            pids=hosted.pids,
            incarnation=hosted.incarnation,
            reason="",
        )

    def _weight_peers(self, worker_id: str) -> tuple[str, ...]:
        """Running workers that may serve the same weights, each start's in another order, so that they share the load.

        Those of other editions come last: they may have the same checkpoint, which the worker itself finds out.
        """
        ready = [each for each in self._hosted if self._entries[each].state is WorkerState.READY and each != worker_id]
        self._peer_turn += 1
        turn, edition = self._peer_turn % max(1, len(ready)), self._entries[worker_id].edition
        order = sorted(ready[turn:] + ready[:turn], key=lambda each: self._entries[each].edition != edition)
        addresses = [address for each in order for address in self._hosted[each].weights_addresses]
        return tuple(addresses[:MOST_WEIGHT_PEERS])

    async def _begin(self, worker_id: str) -> None:
        await self._try_bring_up(worker_id)
        await self._keep(worker_id)

    async def _keep(self, worker_id: str) -> None:
        """Watch one worker and start it again whenever it is gone."""
        loop = asyncio.get_running_loop()
        deaths = 0
        while True:
            hosted = self._hosted.get(worker_id)
            if hosted is not None:
                since = loop.time()
                reason = await self._ended(worker_id, hosted)
                deaths = 1 if loop.time() - since > self._backoff.healthy_after_s else deaths + 1
                self._hosted.pop(worker_id, None)
                log.warning("worker %s is gone: %s", worker_id, reason)
            else:
                deaths, reason = deaths + 1, self._entries[worker_id].reason
            self._next_incarnation(worker_id, reason)
            if not self._restart:
                self._update(worker_id, state=WorkerState.STOPPED)
                return
            await asyncio.sleep(self._backoff.delay(deaths))
            await self._try_bring_up(worker_id)

    async def _ended(self, worker_id: str, hosted: Hosted) -> str:
        """Returns once the worker is gone, by itself or because it stood still; the reason."""
        if self._until_stuck is None:
            return await hosted.ended()
        ended = asyncio.ensure_future(hosted.ended())
        stuck = asyncio.ensure_future(self._until_stuck(self._settings[worker_id], hosted.address))
        try:
            await until_done((ended, stuck), 1)
            if ended.done():
                return ended.result()
            reason = stuck.result()
            log.error("worker %s stands still and is ended: %s", worker_id, reason)
            await hosted.stop(0.0)
            return reason
        finally:
            ended.cancel()
            stuck.cancel()
            await asyncio.gather(ended, stuck, return_exceptions=True)

    async def _try_bring_up(self, worker_id: str) -> None:
        """Start one worker; a failure is noted in its entry."""
        try:
            await self._bring_up(worker_id)
        except StartError as error:
            log.warning("worker %s did not come up: %s", worker_id, error)
            self._update(worker_id, state=WorkerState.RESTARTING, reason=str(error))

    def _next_incarnation(self, worker_id: str, reason: str) -> None:
        entry = self._entries[worker_id]
        incarnation = entry.incarnation + 1
        self._settings[worker_id] = replace(self._settings[worker_id], incarnation=incarnation)
        self._update(
            worker_id,
            state=WorkerState.RESTARTING,
            incarnation=incarnation,
            restarts=entry.restarts + 1,
            reason=reason,
            address="",
            pids=(),
        )

    def _update(self, worker_id: str, **changes: object) -> None:
        self._entries[worker_id] = replace(self._entries[worker_id], **changes)  # type: ignore[arg-type]  # checked by the dataclass's fields
        self._tell()

    def _tell(self) -> None:
        self._version += 1
        self._changed.set()
        self._changed = asyncio.Event()
        if self._on_change is not None:
            self._on_change(self.roster)


def _first_entry(settings: WorkerSettings) -> RosterEntry:
    width = settings.group.width
    return RosterEntry(settings.worker_id, settings.role, width, settings.incarnation, WorkerState.STARTING)
