"""All links of one ingress process, and the asyncio implementation of `router/port.py`'s `Port`.

`generation.py` runs request paths over it; whoever learns of the fleet (`serve_app.py` by watching the controller,
`local.py` from its supervisor) calls `update` with each new roster. One stream per worker; what the router calls
overdue is cut. Must be used on one asyncio loop. Knows nothing of requests beyond their channels.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from penstock.cluster.channel import RequestChannel
from penstock.cluster.roster import Roster, RosterEntry, WorkerState
from penstock.cluster.worker_link import LinkIdentity, WorkerLink
from penstock.router.emission import Emission
from penstock.router.router import Router
from penstock.workers.protocol import Load, Welcome

log = logging.getLogger(__name__)

WATCH_INTERVAL_S = 0.25


@dataclass(frozen=True, slots=True)
class LinkView:
    """One worker as its link sees it."""

    entry: RosterEntry
    attached: bool = False
    welcome: Welcome | None = None  # None before the first attach
    load: Load | None = None  # None while not attached
    load_age_s: float = 0.0
    refused: str = ""  # why the router gives it no work although it is attached; empty: it does
    trusted: bool = True  # it has not failed again and again lately
    quarantined: bool = False  # its KV came damaged; it gets no prompts for a while


class AsyncSignal:
    """See `router/port.py:Signal`."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def set(self) -> None:
        """Wake the waiter."""
        self._event.set()

    async def wait(self, timeout_s: float) -> bool:
        """True when set, False after `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._event.wait()
        except TimeoutError:
            return False
        self._event.clear()
        return True


class Links:
    """See `router/port.py:Port` for `now`, `sleep`, `signal` and `open_channel`."""

    def __init__(self, router: Router, identity: LinkIdentity, on_change: Callable[[], None] | None = None) -> None:
        self._router = router
        self._identity = identity
        self._on_change = on_change
        self._links: dict[str, WorkerLink] = {}
        self._roster = Roster(-1, ())
        self._closing: set[asyncio.Future[None]] = set()
        self._watcher: asyncio.Future[None] | None = None
        self._looked_at = 0.0
        self._attached = asyncio.Event()

    # --- the port -------------------------------------------------------------------------------------------------

    def now(self) -> float:
        """Monotonic seconds."""
        return asyncio.get_running_loop().time()

    async def sleep(self, seconds: float) -> None:
        """Let other requests go on for so long."""
        await asyncio.sleep(seconds)

    def signal(self) -> AsyncSignal:
        """One waiting request's alarm."""
        return AsyncSignal()

    def open_channel(self, emission: Emission) -> RequestChannel:
        """One request's way to its workers."""
        return RequestChannel(self, emission)

    def post_to(self, worker_id: str) -> WorkerLink | None:
        """The link to an attached worker; None when there is none."""
        link = self._links.get(worker_id)
        return link if link is not None and link.attached else None

    # --- the fleet ------------------------------------------------------------------------------------------------

    def update(self, roster: Roster) -> None:
        """Follow a newer roster: link what is new or came back elsewhere, unlink what is gone. Ignores older ones."""
        if roster.version <= self._roster.version:
            return
        self._roster = roster
        if self._watcher is None:
            self._looked_at = self.now()
            self._watcher = asyncio.ensure_future(self._watch_overdue())
        live = {entry.worker_id: entry for entry in roster.entries if entry.state in _LINKED}
        for worker_id, link in list(self._links.items()):
            if not _same(link.entry, live.get(worker_id)):
                del self._links[worker_id]
                # Now, not in the task: the router must hear of the loss before a successor of the same id joins.
                link.cut("the worker is gone or was replaced")
                self._later(link.close())
        for worker_id, entry in live.items():
            if worker_id in self._links:
                self._links[worker_id].entry = entry
            else:
                self._links[worker_id] = WorkerLink(entry, self._identity, self._router, self._changed)
        self._changed()

    def views(self) -> list[LinkView]:
        """Every worker of the roster with what its stream says."""
        now = self.now()
        views = []
        for entry in self._roster.entries:
            link = self._links.get(entry.worker_id)
            if link is None:
                views.append(LinkView(entry))
            else:
                refusal = self._router.fleet.refused.get(entry.worker_id)
                why = refusal.reason if refusal is not None else ""
                known = self._router.fleet.workers.get(entry.worker_id)
                trusted = known is None or known.breaker.closed(now)
                held = self._router.fleet.quarantine.holds(entry.worker_id, now)
                age_s = now - link.load_at
                views.append(LinkView(entry, link.attached, link.welcome, link.load, age_s, why, trusted, held))
        return views

    @property
    def behind_s(self) -> float:
        """By how much this process's loop is late: it should look at its workers every `WATCH_INTERVAL_S`."""
        return max(0.0, self.now() - self._looked_at - WATCH_INTERVAL_S) if self._watcher is not None else 0.0

    async def wait_attached(self, timeout_s: float) -> bool:
        """True once every worker of the roster is attached; False if that took too long."""
        deadline = self.now() + timeout_s
        while not (self._links and all(link.attached for link in self._links.values())):
            remaining = deadline - self.now()
            if remaining <= 0:
                return False
            self._attached.clear()
            try:
                await asyncio.wait_for(self._attached.wait(), remaining)
            except TimeoutError:
                return False
        return True

    async def close(self) -> None:
        """Drop every stream; requests under way hear `Lost`."""
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.gather(self._watcher, return_exceptions=True)
        links, self._links = list(self._links.values()), {}
        for link in links:
            link.cut("the router is closing")
        await asyncio.gather(*(link.close() for link in links), *self._closing)

    async def _watch_overdue(self) -> None:
        """Cut the streams of workers that are silent or stuck."""
        while True:
            await asyncio.sleep(WATCH_INTERVAL_S)
            self._looked_at = self.now()
            for worker_id, reason in self._router.overdue(self._looked_at):
                link = self._links.get(worker_id)
                if link is not None and link.attached:
                    log.warning("worker %s is overdue: %s", worker_id, reason)
                    link.cut(reason)

    def _changed(self) -> None:
        self._attached.set()
        if self._on_change is not None:
            self._on_change()

    def _later(self, closing: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(closing)
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)


_LINKED = (WorkerState.READY, WorkerState.STOPPING)


def _same(entry: RosterEntry, other: RosterEntry | None) -> bool:
    return other is not None and (entry.address, entry.incarnation) == (other.address, other.incarnation)
