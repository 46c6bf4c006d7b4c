"""Which running sequences go on at another decode worker, with their KV, and what each such move has come to.

Used by `request_path.py` for every stream, over the parts that `router.py` joins, which asks for `tick` with the
watchdog's rhythm and whenever a worker begins to drain. Sequences leave a worker that drains, all of them; and a worker
whose KV is short, a few, while another has much room. The source decodes on until the destination has nearly all
blocks; if a move comes to nothing the stream never notices. Decides; awaits and sends nothing.

Invariants: a journey has at most one move, whose attempt is newer than its own; the destination's stake is among the
journey's until the move is over; exactly one of the two workers' tokens count from any index on (`emission.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from penstock.router.attempts import DECODING
from penstock.router.fleet import Fleet, WorkerView
from penstock.router.journey import Journey
from penstock.router.placement import Placement, Route
from penstock.router.port import Event, Lost
from penstock.router.prefix_index import PrefixIndex
from penstock.router.settings import MoveSettings
from penstock.router.trail import LIVE, MOVED_LIVE
from penstock.workers.protocol import Failed, Stays

_AGAIN_S = 0.25  # after a move that came to nothing, or found no room
_VERDICT_S = 2.0  # one of the two workers is gone: wait so long for the other to say that it has the sequence


@dataclass(slots=True, eq=False)
class LiveMove:
    """A sequence on its way from `source` to `target`, where it is attempt `attempt`."""

    source: str
    target: str
    attempt: int
    emitted: int  # tokens that the target's request has
    until: float  # without a grant by then it is given up
    sent: bool = False  # the source was told; from then on either of the two may have it
    out: list[Event] = field(default_factory=list)  # what was heard since of the two that are gone
    verdict_at: float = math.inf  # then one that is left has not said that it has it

    def concerns(self, event: Event, now: float) -> bool:
        """Whether only the move hangs on this event, and not the attempt at the source."""
        if event.worker_id == self.target:
            about_it = event.attempt == self.attempt or isinstance(event.body, Lost)
        else:
            # It may have ended after it had handed over everything.
            about_it = self.sent and event.worker_id == self.source and isinstance(event.body, Lost)
        if about_it and self.sent and isinstance(event.body, Failed | Lost):
            self.out.append(event)
            self.verdict_at = min(self.verdict_at, now + _VERDICT_S)
        return about_it

    def comes_to_nothing(self, event: Event, now: float) -> bool:
        """Whether the source goes on for certain."""
        if isinstance(event.body, Stays):
            return event.worker_id == self.source
        out = event.worker_id == self.target and isinstance(event.body, Failed | Lost)
        return not self.sent and (out or now >= self.until)


class LiveMoves:
    """All moves of one router."""

    def __init__(self, settings: MoveSettings, fleet: Fleet, index: PrefixIndex, placement: Placement) -> None:
        self._settings = settings
        self._fleet = fleet
        self._index = index
        self._placement = placement
        self._short_since: dict[str, float] = {}  # workers whose KV is short
        self._preemptions: dict[str, int] = {}

    def tick(self, journeys: Iterable[Journey], now: float) -> None:
        """Ask streams to leave, as many as may at a time; each hears of it by its nudge."""
        budgets = {view.worker_id: budget for view in self._sources() if (budget := self._budget(view, now))}
        if not budgets:
            return
        staying: dict[str, list[Journey]] = {worker_id: [] for worker_id in budgets}
        for journey in journeys:
            source = journey.route.decode if journey.route is not None else None
            if source is None or source not in budgets:
                continue
            if journey.leaving or journey.move is not None:
                budgets[source] -= 1
            elif journey.settled and journey.alone_on is None and now >= journey.stays_until:
                staying[source].append(journey)
        for source, candidates in staying.items():
            candidates.sort(key=lambda journey: journey.arrived, reverse=True)  # who would be preempted first
            for journey in candidates[: max(0, budgets[source])]:
                journey.leaving = True
                journey.nudge()

    def begin(self, journey: Journey) -> LiveMove | None:
        """Choose where the stream goes on; None: nowhere better at the moment."""
        journey.leaving = False
        now, route = journey.clock(), journey.route
        source = self._fleet.workers.get(route.decode or "") if route is not None else None
        if source is None or journey.move is not None:
            return None
        journey.stays_until = now + _AGAIN_S
        ask = journey.ask()
        room = 0.0 if source.draining else self._settings.room_share
        target = self._placement.choose_target(ask, source, now, room)
        if target is None:
            return None
        view = self._fleet.workers[target]
        blocks = -(-(ask.context_tokens + ask.growth) // view.welcome.block_size)
        journey.stakes[target] = self._fleet.stake(target, 0, blocks, now)
        journey.issued += 1
        move = LiveMove(
            source.worker_id, target, journey.issued, journey.emission.count, now + self._settings.patience_s
        )
        journey.move = move
        journey.emission.expect_successor(move.attempt, lambda: self._taken_over(journey, move))
        return move

    def give_up(self, journey: Journey) -> None:
        """The move came to nothing: the stream goes on at the source."""
        move, journey.move = journey.move, None
        if move is not None:
            journey.moves_stayed += 1
            journey.emission.forget_successor()
            self._fleet.close(journey.stakes.pop(move.target))

    def check(self, journey: Journey, move: LiveMove, now: float) -> None:
        """Raises AttemptError when nobody is left who could have the sequence, or says so."""
        if len(move.out) > 1 or now >= move.verdict_at:
            journey.raise_if_over(move.out[0])

    def _taken_over(self, journey: Journey, move: LiveMove) -> None:
        """The target's first row fits what is out: it is the worker of this stream from here on."""
        now, emission = journey.clock(), journey.emission
        journey.move = None
        journey.left = move.source
        stake = journey.stakes.pop(move.source, None)
        source = self._fleet.workers.get(move.source)
        if source is not None:
            self._fleet.add_work(source, emission.count - journey.attempt_base, now)
        if stake is not None:
            self._fleet.close(stake)
        journey.stakes[move.target].started = True
        journey.route = Route(None, move.target, 0, 0)
        journey.attempt, journey.attempt_base = move.attempt, emission.count
        journey.live_moves += 1
        journey.stays_until = now + self._settings.rest_s
        journey.note_end(MOVED_LIVE)
        journey.note_attempt(journey.route, LIVE, now)
        self._index.assume(move.target, journey.digests, now)
        journey.nudge()

    def _sources(self) -> list[WorkerView]:
        views = self._fleet.workers.values()
        return [view for view in views if view.welcome.role in DECODING]

    def _budget(self, view: WorkerView, now: float) -> int:
        """How many may be on their way from this worker at a time."""
        settings = self._settings
        if view.draining:
            return settings.at_once
        if not settings.rebalance or view.load is None:
            return 0
        before = self._preemptions.get(view.worker_id, view.load.preemptions)
        self._preemptions[view.worker_id] = view.load.preemptions
        free = view.load.free_blocks / max(1, view.welcome.num_blocks)
        if view.load.preemptions > before or (view.load.waiting and free < settings.short_share):
            self._short_since.setdefault(view.worker_id, now)
        elif free >= 2 * settings.short_share and not view.load.waiting:
            self._short_since.pop(view.worker_id, None)
        since = self._short_since.get(view.worker_id)
        return settings.rebalance_at_once if since is not None and now - since >= settings.short_s else 0
