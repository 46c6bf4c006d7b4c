"""The bookkeeping of attempts: where one goes, what it holds there, and what its end teaches.

Used by `request_path.py` for every journey, over the parts that `router.py` joins. Decides; awaits and sends nothing.

Invariants: a journey has stakes only while an attempt is current; a worker is claimed only by a journey that names it
in `alone_on`; a homeless journey is woken whenever the fleet changes or a worker becomes idle.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from penstock.router.admission import Admission
from penstock.router.fleet import Fleet, Stake
from penstock.router.handovers import Handovers
from penstock.router.journey import AttemptError, Journey
from penstock.router.placement import Ask, Placement, Route, understands
from penstock.router.prefix_index import PrefixIndex
from penstock.router.retry_budget import RetryBudget
from penstock.router.settings import RetrySettings
from penstock.workers.errors import RefusedError
from penstock.workers.protocol import EndReason, FailureCode, Role

log = logging.getLogger(__name__)

DECODING = (Role.DECODE, Role.MIXED)
_RETURN_S = 1.0  # within which a worker that was only out of sight is back
_UNSENT = frozenset({FailureCode.TRANSFER_FAILED, FailureCode.KV_DAMAGED})
_UNPACED = frozenset({FailureCode.DRAINING, FailureCode.ADAPTER})  # the next worker is none the worse for it
_BLAMED = frozenset({FailureCode.INTERNAL, *_UNSENT})


class Attempts:
    """All current attempts of one router."""

    def __init__(
        self,
        settings: RetrySettings,
        fleet: Fleet,
        index: PrefixIndex,
        placement: Placement,
        admission: Admission,
        draw: Callable[[], float],
    ) -> None:
        self._settings = settings
        self._fleet = fleet
        self._index = index
        self._placement = placement
        self._admission = admission
        self._draw = draw
        self._budget = RetryBudget(settings.budget_share, settings.budget_per_s, settings.budget_burst)
        self._handovers = Handovers(settings.sibling_wait_s)
        self._homeless: dict[Journey, None] = {}  # admitted, waiting for a worker that takes them

    @property
    def homeless(self) -> int:
        """Requests that found no worker at the moment."""
        return len(self._homeless)

    def wake_homeless(self) -> None:
        """Something changed: those without a place look again."""
        for journey in list(self._homeless):
            journey.ticket.wake()

    def sibling_wait(self, journey: Journey) -> float:
        """Seconds worth waiting because the same prompt is just being handed to a decode worker; mostly 0."""
        return self._handovers.wait(journey.digests, journey.ticket.wake, journey.clock())

    def place(self, journey: Journey) -> Route | None:
        """Choose workers and begin an attempt there; None: wait. Raises PenstockError when all refused, or died."""
        now = journey.clock()
        self._homeless.pop(journey, None)
        journey.suspicion.forgive(self._lives)
        if journey.suspicion.condemned:
            if now - journey.suspicion.deaths[-1].at >= _RETURN_S:
                raise RefusedError(FailureCode.POISONED, "workers died whenever they computed this request")
            self._homeless[journey] = None
            return None
        ask = journey.ask()
        refused = journey.refused.keys()
        if journey.suspicion.suspect:
            route = self._alone(journey)
        else:
            route = self._placement.choose(ask, now, journey.avoid | refused)
            route = route or self._placement.choose(ask, now, refused)
        if route is not None:
            self._begin(journey, route, now)
            return route
        self._homeless[journey] = None
        if refused and self._placement.choose(ask, now) is not None:
            error = journey.refused_by_all()
            if error is not None:
                raise error
        return None

    def check_move(self, journey: Journey) -> None:
        """Raises AttemptError, as a refusal, when another worker has the room that this one lacks."""
        route = journey.route
        if route is None or route.decode is None or journey.alone_on is not None:
            return
        stake, now = journey.stakes[route.decode], journey.clock()
        ahead = stake.tokens_ahead + stake.view.others_prefill_tokens
        if self._placement.has_room_elsewhere(journey.ask(), route, ahead, now, journey.refused.keys()):
            raise AttemptError(route.decode, FailureCode.QUEUE_FULL, "another worker has room", moved=True)

    def check_open(self, journey: Journey, worker_id: str) -> None:
        """Raises AttemptError, as a refusal, when the worker has begun to drain, or is gone, since it was chosen."""
        view = journey.stakes[worker_id].view
        if self._fleet.workers.get(worker_id) is not view:
            raise AttemptError(worker_id, FailureCode.DRAINING, "the worker went before it was asked", moved=True)
        if view.draining and journey.alone_on is None:
            raise AttemptError(worker_id, FailureCode.DRAINING, "the worker began to drain", moved=True)

    def started(self, journey: Journey, worker_id: str, cached_tokens: int) -> None:
        """The worker computes. Only the first start counts as cache use: later ones find our own blocks."""
        stake = journey.stakes.get(worker_id)
        if stake is not None:
            stake.started = True
        if "started" not in journey.trail.times:
            journey.emission.cached_tokens = cached_tokens
        journey.mark("started")

    def watch(self, journey: Journey) -> None:
        """A suspect that gets past the point where workers died is none: its worker is open to others again."""
        if journey.alone_on is not None and (journey.progressed or journey.emission.ended):
            journey.suspicion.acquit()
            self._release_claim(journey)

    def interrupted(self, journey: Journey, cause: AttemptError) -> float:
        """An attempt is over: settle it. Returns the pause before the next. Raises when there will be none."""
        now = journey.clock()
        orphaned = self._lost_a_partner(journey)
        if cause.code in _BLAMED and not orphaned:
            self._blame(journey, cause, now)
        unpaced = cause.died or cause.moved or orphaned or cause.code in _UNPACED
        journey.note_end("moved" if cause.moved else cause.code)
        journey.moves_failed += journey.move is not None
        journey.move = None
        try:
            journey.survive(cause)
        finally:
            self.end(journey)
        if orphaned:
            journey.refused.pop(cause.worker_id, None)  # who is gone has not refused; its successor may be asked
        if journey.remaining == 0:
            last, sampling = journey.emission.tokens[-1:], journey.request.sampling
            may_stop = journey.emission.count > sampling.min_tokens
            stopped = may_stop and bool(last) and last[0] in sampling.stop_token_ids
            journey.emission.conclude(EndReason.STOP if stopped else EndReason.LENGTH)
            return 0.0
        pause_s = 0.0 if cause.refusal else journey.next_backoff(self._draw())
        return pause_s if unpaced else max(pause_s, self._budget.spend(now))

    def reenter(self, journey: Journey) -> None:
        """Back to the gate, ahead of newcomers."""
        uncached = self._placement.uncached_anywhere(journey.ask(), journey.clock())
        journey.recomputed += uncached if journey.started else 0
        self._admission.reenter(journey.ticket, uncached)

    def succeeded(self, journey: Journey) -> None:
        """The choice ended well: its workers are to be trusted."""
        for stake in journey.stakes.values():
            stake.view.breaker.succeeded()

    def end(self, journey: Journey) -> None:
        """Whatever the current attempt holds is given back. Idempotent."""
        now = journey.clock()
        journey.settled = journey.leaving = False
        journey.moves_stayed += journey.move is not None  # it ended before the move did
        journey.move = None
        journey.emission.forget_successor()
        for stake in journey.stakes.values():
            self._fleet.close(stake)
        decode = self._fleet.workers.get(journey.route.decode or "") if journey.route is not None else None
        if decode is not None and journey.stakes:
            self._fleet.add_work(decode, journey.emission.count - journey.attempt_base, now)
        journey.stakes.clear()
        self._homeless.pop(journey, None)
        self._release_claim(journey)
        self.wake_homeless()

    def _begin(self, journey: Journey, route: Route, now: float) -> None:
        journey.issued += 1
        journey.attempt = journey.issued
        if journey.attempt == 1:
            self._budget.earn()
        journey.route = route
        journey.attempt_base = journey.emission.count
        ask = journey.ask()
        journey.note_attempt(route, _kind_of_choice(journey, route, ask), now)
        if journey.predicted_cached is None:
            journey.predicted_cached = ask.context_tokens - route.prefill_tokens
        if route.prefill is not None and route.decode is not None:
            self._fleet.pairs.tried(route.prefill, route.decode, now)
        for worker_id in route.workers:
            decodes = worker_id == route.decode
            block_size = self._fleet.workers[worker_id].welcome.block_size
            tokens = route.decode_tokens + ask.growth if decodes else route.prefill_tokens
            prefill_tokens = route.prefill_tokens if worker_id == route.computes else 0
            self._fleet.workers[worker_id].breaker.tried(now)
            journey.stakes[worker_id] = self._fleet.stake(worker_id, prefill_tokens, -(-tokens // block_size), now)
        self._index.assume(route.computes, journey.digests, now)
        computing = journey.stakes[route.computes]
        journey.emission.begin_attempt(journey.attempt)
        journey.emission.notify_at(journey.attempt_base + 1, lambda: self._computed(journey, computing))

    def _computed(self, journey: Journey, stake: Stake) -> None:
        """The attempt's first token is there; called by the link that brought it, before the reader hears of it."""
        now, route, emission = journey.clock(), journey.route, journey.emission
        journey.mark("first_token")
        stake.started = True
        stake.view.breaker.passed()
        self._fleet.computed(stake, now)
        self._admission.computed(journey.ticket)
        if route is None or route.decode is None or not route.split or emission.ended:
            journey.settled = route is not None and route.decode is not None
            return
        # The KV is on its way: the decode worker counts as holding the prompt from now on.
        journey.stakes[route.decode].started = True
        self._index.assume(route.decode, journey.digests, now)
        self._handovers.begin(journey.digests, now)
        emission.notify_at(emission.count + 1, lambda: self._handed_over(journey))

    def _handed_over(self, journey: Journey) -> None:
        """The decode worker's first own token is there."""
        route = journey.route
        if route is not None and (stake := journey.stakes.get(route.decode or "")) is not None:
            stake.view.breaker.passed()
            self._fleet.pairs.succeeded(route.prefill or "", route.decode or "")
        journey.mark("handed_over")
        journey.settled = True
        self._handovers.done(journey.digests)

    def _alone(self, journey: Journey) -> Route | None:
        """A suspect runs on one worker that takes nothing else: claim one and let it run empty.

        What still streams there after a while is no suspect; it is not waited for any longer.
        """
        view, ask = self._fleet.workers.get(journey.alone_on or ""), journey.ask()
        if view is None:
            journey.alone_on = None
            views = self._fleet.alive(DECODING)
            open_views = [view for view in views if view.claimed_by is None and understands(view, ask)]
            if not open_views:
                return None
            view = min(open_views, key=lambda each: (each.sequences, each.worker_id))
            view.claimed_by = journey.request.request_id
            journey.alone_on = view.worker_id
            journey.alone_until = journey.clock() + self._settings.alone_wait_s
        if view.sequences and journey.clock() < journey.alone_until:
            return None
        return Route(None, view.worker_id, ask.context_tokens, ask.context_tokens)

    def _blame(self, journey: Journey, cause: AttemptError, now: float) -> None:
        """A hand-over that failed is held against the pair, and against who fails with others, too."""
        route, blamed = journey.route, [cause.worker_id]
        handing_over = cause.code in _UNSENT and not journey.settled
        if handing_over and route is not None and route.prefill is not None and route.decode is not None:
            blamed = self._fleet.pairs.failed(route.prefill, route.decode, now)
            damaged = cause.code is FailureCode.KV_DAMAGED and route.decode not in blamed
            if damaged and self._fleet.quarantine.mismatched(route.prefill, now):
                log.warning("worker %s sends damaged KV again and again; no prompts for a while", route.prefill)
        for worker_id in blamed:
            if (view := self._fleet.workers.get(worker_id)) is not None:
                view.breaker.failed(now)

    def _lives(self, worker_id: str, incarnation: int) -> bool:
        view = self._fleet.workers.get(worker_id)
        return view is not None and view.welcome.incarnation == incarnation

    def _release_claim(self, journey: Journey) -> None:
        view = self._fleet.workers.get(journey.alone_on or "")
        if view is not None and view.claimed_by == journey.request.request_id:
            view.claimed_by = None
            self._admission.wake_all()
            self.wake_homeless()
        journey.alone_on = None

    def _lost_a_partner(self, journey: Journey) -> bool:
        """True when a worker of the route is gone: the other one's complaint is no fault of its own."""
        return any(self._fleet.workers.get(stake.view.worker_id) is not stake.view for stake in journey.stakes.values())


def _kind_of_choice(journey: Journey, route: Route, ask: Ask) -> str:
    """What the choice came to; a closed set, fit for a metric's label."""
    if journey.suspicion.suspect:
        return "alone"
    where = "split" if route.split else "local" if route.decode is not None else "first_token"
    return where if route.prefill_tokens >= ask.context_tokens else f"{where}_cached"
