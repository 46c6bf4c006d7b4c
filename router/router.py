"""The router object of one ingress process: what links feed, and what `request_path.py` asks.

Links (in `cluster/`) call, always on the one thread that also runs the request paths:

    worker_joined(welcome, now)             after each Welcome, also a returning worker's; send RequestSnapshot then
    worker_lost(worker_id, reason, now)     before the link tells its channels `Lost`
    heard(worker_id)                        each message
    load_arrived(worker_id, load, now)      each heartbeat
    kv_events(worker_id, events) -> bool    True: events are missing, send RequestSnapshot
    kv_snapshot(worker_id, snapshot)        its answer
    overdue(now) -> [(worker_id, reason)]   ask every 0.25 s or so; break these workers' streams, report them lost

The rest is for the request path. The parts decide for themselves (`fleet.py`, `prefix_index.py`, `placement.py`,
`admission.py`, `attempts.py`, `journey.py`); this object joins their bookkeeping. Knows no transport, no
clock of its own, no threads.

Invariant: a journey that is finished holds no stake, no ticket, no claim, and has been reported once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np

from penstock.router.admission import Admission
from penstock.router.attempts import DECODING, Attempts
from penstock.router.emission import Emission
from penstock.router.fleet import Fleet
from penstock.router.journey import COMPLETED, Journey, RequestReport
from penstock.router.live_moves import LiveMoves
from penstock.router.placement import Placement
from penstock.router.prefix_index import PrefixIndex
from penstock.router.settings import RouterSettings
from penstock.router.ticket import Ticket, growth_of
from penstock.workers.errors import RefusedError, RequestError
from penstock.workers.protocol import FailureCode, GenerateRequest, KVEvents, KVSnapshot, Load, Role, Welcome

log = logging.getLogger(__name__)


class Router:
    """State shared by all requests of one ingress process.

    `seed` decides ties and jitter; `observe` is told each request's one final report.
    """

    def __init__(
        self,
        settings: RouterSettings,
        *,
        seed: int = 0,
        observe: Callable[[RequestReport], None] | None = None,
    ) -> None:
        draw = np.random.default_rng(seed).random
        self.settings = settings
        self.fleet = Fleet(settings.health, settings.placement.balance_window_s)
        self.index = PrefixIndex(settings.index, seed)
        self.placement = Placement(settings.placement, self.fleet, self.index, draw)
        self.admission = Admission(settings.admission, self.fleet, draw)
        self.attempts = Attempts(settings.retry, self.fleet, self.index, self.placement, self.admission, draw)
        self.moves = LiveMoves(settings.moves, self.fleet, self.index, self.placement)
        self._observe = observe
        self._journeys: dict[Journey, None] = {}
        self._refusals_told: dict[str, str] = {}  # worker id -> the reason that the log has

    # --- fed by links ---------------------------------------------------------------------------------------------

    def worker_joined(self, welcome: Welcome, now: float) -> None:
        """A worker is there (again). One that `fleet.refused` names after this gets no work."""
        if not self.fleet.join(welcome, now):
            self._tell_refusal(welcome.worker_id, self.fleet.refused[welcome.worker_id].reason)
            return
        self._admitted(welcome)

    def worker_lost(self, worker_id: str, reason: str, now: float) -> None:
        """A worker is gone, whatever it held with it."""
        view = self.fleet.lose(worker_id)
        self.index.forget(worker_id)
        if view is not None:
            log.warning("lost worker %s: %s", worker_id, reason)
            view.breaker.failed(now)
            self.fleet.expect_back(view, now)
            self._fleet_changed()

    def heard(self, worker_id: str) -> None:
        """A message of any kind: a sign of life."""
        self.fleet.heard(worker_id)

    def load_arrived(self, worker_id: str, load: Load, now: float) -> None:
        """A heartbeat."""
        before = self.fleet.version
        self.fleet.load_arrived(worker_id, load)
        if self.fleet.version != before:
            self._fleet_changed()
            self.moves.tick(self._journeys, now)

    def kv_events(self, worker_id: str, events: KVEvents) -> bool:
        """Changes of a worker's prefix cache. Returns True when a snapshot is needed."""
        return self.index.apply_events(worker_id, events)

    def kv_snapshot(self, worker_id: str, snapshot: KVSnapshot) -> None:
        """A worker's whole prefix cache."""
        self.index.apply_snapshot(worker_id, snapshot)

    def overdue(self, now: float) -> list[tuple[str, str]]:
        """Workers that are silent or stuck, with the reason in one short sentence. Sheds who waits in vain, too."""
        for welcome in self.fleet.reconsider(now):
            log.info("worker %s is taken in after all", welcome.worker_id)
            self._admitted(welcome)
        self.admission.shed_late(now)
        self.moves.tick(self._journeys, now)
        return self.fleet.overdue(now)

    # --- asked by the request path --------------------------------------------------------------------------------

    def begin(
        self, request: GenerateRequest, emission: Emission, wake: Callable[[], None], clock: Callable[[], float]
    ) -> Journey:
        """A request arrives. It is accounted for from here on; `finish` must follow."""
        growth = growth_of(request.remaining)
        # Further choices belong to a call that is being answered already: they are not refused for being late.
        target_s = None if request.sampling.choice else request.queue_timeout_s
        ticket = Ticket(request.tenant, request.priority, emission, growth, request.context_length, wake, target_s)
        journey = Journey(request, emission, ticket, self.settings.retry, clock)
        self._journeys[journey] = None
        return journey

    def enter(self, journey: Journey) -> None:
        """Join the line. Raises RefusedError when it is full, or too long to begin in time."""
        journey.ticket.prefill_tokens = self.placement.uncached_anywhere(journey.ask(), journey.clock())
        self.admission.arrive(journey.ticket, journey.clock())

    def check_wait(self, journey: Journey) -> None:
        """Raises RefusedError when there is no point in waiting longer."""
        if journey.ticket.shed is not None:
            raise journey.ticket.shed
        roles = (*DECODING, Role.PREFILL) if journey.remaining == 1 else DECODING
        journey.check_wait(bool(self.fleet.alive(roles)), journey.clock())

    def complete(self, journey: Journey) -> RequestReport:
        """The choice ended well."""
        self.attempts.succeeded(journey)
        return self._report(journey, COMPLETED)

    def fail(self, journey: Journey, error: Exception) -> None:
        """The request ends with an error; one that is not ours is a defect."""
        code = FailureCode.BAD_REQUEST if isinstance(error, RequestError) else FailureCode.INTERNAL
        self._report(journey, error.code if isinstance(error, RefusedError) else code)

    def moved(self, journey: Journey) -> None:
        """A move of this stream is over, one way or the other: another may begin."""
        self.moves.tick(self._journeys, journey.clock())

    def cut(self) -> None:
        """The process is about to end: every request that is still open ends now, with a typed error."""
        for journey in self._journeys:
            journey.cut = True
            journey.nudge()
            journey.ticket.wake()

    def finish(self, journey: Journey) -> None:
        """Give everything back. A request that was not reported was cancelled."""
        if journey.emission.ended and not journey.reported:
            self.complete(journey)  # its reader had the end, and left before the request path heard of it
        self.attempts.end(journey)
        self.admission.leave(journey.ticket, journey.clock())
        self._journeys.pop(journey, None)
        if not journey.reported:
            self._report(journey, FailureCode.CANCELLED)

    def check_integrity(self) -> None:
        """Raises ValueError when counters and journeys disagree."""
        self.fleet.check_integrity(stake for journey in self._journeys for stake in journey.stakes.values())
        self.admission.check_integrity()
        claims = {view.claimed_by for view in self.fleet.workers.values()} - {None}
        if not claims <= {journey.request.request_id for journey in self._journeys if journey.alone_on}:
            raise ValueError("a worker is claimed by nobody")

    def _admitted(self, welcome: Welcome) -> None:
        self._refusals_told.pop(welcome.worker_id, None)
        self.index.track(welcome.worker_id)
        self._fleet_changed()

    def _tell_refusal(self, worker_id: str, reason: str) -> None:
        """Once for each reason, however often its stream breaks and comes back."""
        if self._refusals_told.get(worker_id) != reason:
            log.warning("worker %s is refused: %s", worker_id, reason)
            if len(self._refusals_told) > 4 * len(self.fleet.workers) + 64:
                self._refusals_told.clear()
            self._refusals_told[worker_id] = reason

    def _fleet_changed(self) -> None:
        self.admission.wake_all()
        self.attempts.wake_homeless()

    def _report(self, journey: Journey, terminal: str) -> RequestReport:
        journey.mark("ended")
        journey.note_end(terminal)
        journey.reported = True
        report = journey.report(terminal)
        if self._observe is not None:
            self._observe(report)
        return report
