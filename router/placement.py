"""Where a request goes: the pair of prefill and decode worker, or one worker for both, that costs least.

Asked by `request_path.py` through `router.py`, with what the request needs; answers with a `Route` or None. Costs come
from the policy chosen by name (`policies/`), in prefill tokens. P = D wins where a worker that decodes holds nearly
all of the context already, where the prompt is short, and where the prefilling workers are busier than that.

Pure but for the random draws passed in (ties, samples). Knows beliefs only; workers may refuse.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from penstock.router.fleet import Fleet, WorkerView
from penstock.router.policies.candidate import Candidate, Phase, Policy
from penstock.router.policies.least_loaded import LeastLoaded
from penstock.router.policies.prefix_load import PrefixLoad
from penstock.router.prefix_index import PrefixIndex
from penstock.router.settings import PlacementSettings
from penstock.workers.errors import ConfigError
from penstock.workers.protocol import Role, Welcome
from penstock.workers.transfer.head_slices import reason_against

POLICIES: MappingProxyType[str, type[Policy]] = MappingProxyType(
    {
        "prefix_load": PrefixLoad,
        "least_loaded": LeastLoaded,
    }
)

_QUEUEING_CONTEXTS = 4.0  # a decode worker without room costs this many times the context
_AS_FAST = 1.5  # workers whose speeds differ by less count as equals: measured lines are never quite the same
_WORTH_MOVING = 0.5  # of what stands before a request where it waits: a queue elsewhere that is longer is no gain


@dataclass(frozen=True, slots=True)
class Ask:
    """What one attempt needs."""

    context_tokens: int
    growth: int  # output tokens that need KV at first
    digests: NDArray[np.uint64]  # of the prompt's full blocks
    single: bool = False  # ends at its first token: nothing to decode
    wire_version: int = 0  # that a worker must speak at least


@dataclass(frozen=True, slots=True)
class Route:
    """`prefill` and `decode`: split. Only `decode`: both phases there. Only `prefill`: ends at its first token."""

    prefill: str | None
    decode: str | None
    prefill_tokens: int  # to be computed
    decode_tokens: int  # new KV at the decode worker

    @property
    def workers(self) -> tuple[str, ...]:
        """The workers of the route."""
        return tuple(worker for worker in (self.prefill, self.decode) if worker is not None)

    @property
    def split(self) -> bool:
        """True when KV moves between two workers."""
        return self.prefill is not None and self.decode is not None

    @property
    def computes(self) -> str:
        """The worker that prefills."""
        worker = self.prefill or self.decode
        if worker is None:
            raise ValueError("a route without workers")
        return worker


@dataclass(frozen=True, slots=True)
class _Scored:
    cost: float
    route: Route


class Placement:
    """Scores candidates of one fleet."""

    def __init__(
        self, settings: PlacementSettings, fleet: Fleet, index: PrefixIndex, draw: Callable[[], float]
    ) -> None:
        if settings.policy not in POLICIES:
            raise ConfigError(f"unknown placement policy {settings.policy!r}; known: {', '.join(POLICIES)}", "policy")
        self._policy = POLICIES[settings.policy](settings)
        self._settings = settings
        self._fleet = fleet
        self._index = index
        self._draw = draw

    def choose(self, ask: Ask, now: float, avoid: Collection[str] = ()) -> Route | None:
        """The cheapest route that touches no worker of `avoid`; None if there is none."""
        held = self._index.match(ask.digests, now)
        prefills = self._score(ask, Phase.PREFILL, self._workers(ask, (Role.PREFILL,), avoid, now), held, now)
        decodes = self._score(ask, Phase.DECODE, self._workers(ask, (Role.DECODE,), avoid, now), held, now)
        mixed = self._workers(ask, (Role.MIXED,), avoid, now)
        options = [self._local(cost, each) for cost, each in self._score(ask, Phase.LOCAL, mixed, held, now)[:1]]
        if not decodes and prefills:
            decodes = self._score(ask, Phase.DECODE, mixed, held, now)
        if ask.single:
            served = [
                _Scored(cost, Route(each.worker_id, None, each.uncached_tokens, 0)) for cost, each in prefills[:1]
            ]
        else:
            served = list(self._splits(ask, prefills, [decode for _, decode in decodes], now))
        options += served
        options += self._local_on_decode(ask, bool(served), avoid, held, now)
        return min(options, key=lambda option: option.cost).route if options else None

    def uncached_anywhere(self, ask: Ask, now: float) -> int:
        """Least tokens that any worker would have to compute; what the gate counts."""
        held = self._index.match(ask.digests, now)
        return min(
            (self._uncached(ask, view, held) for view in self._fleet.workers.values()), default=ask.context_tokens
        )

    def has_room_elsewhere(
        self, ask: Ask, route: Route, ahead_tokens: int, now: float, avoid: Collection[str] = ()
    ) -> bool:
        """True when a worker like the decode worker of `route`, where the request still waits, could start it now.

        `ahead_tokens` of prompts are computed there before its own. Where the worker has room the request has but to
        wait for its turn, and goes for a much shorter queue only, or all that wait would change places for ever.
        """
        current = self._fleet.workers.get(route.decode or "")
        if current is None:
            return False
        held = self._index.match(ask.digests, now)
        views = self._workers(ask, (Role.DECODE, Role.MIXED), (*avoid, current.worker_id), now)
        views = self._partners(route.prefill, views, now) if route.prefill is not None else views
        others = [self._candidate(ask, Phase.DECODE, view, held) for view in views]
        wait_tokens = ahead_tokens + ask.context_tokens
        if current.free_blocks and current.all_sequences <= current.welcome.max_num_seqs:  # its own are counted
            wait_tokens = int(_WORTH_MOVING * wait_tokens)
        return any(each.has_room and each.queued_tokens + each.uncached_tokens <= wait_tokens for each in others)

    def choose_target(self, ask: Ask, source: WorkerView, now: float, spare: float) -> str | None:
        """Where a sequence that runs at `source` can go on with its KV at once, `spare` of the blocks staying free."""
        mine = source.welcome
        views = [
            view
            for view in self._fleet.usable((Role.DECODE, Role.MIXED), now)
            if view is not source and understands(view, ask) and _exchange(mine, view.welcome)
        ]
        scored = self._score(ask, Phase.DECODE, views, self._index.match(ask.digests, now), now)
        for _, each in scored:
            if each.has_room and each.free_tokens - each.uncached_tokens >= spare * each.total_tokens:
                return each.worker_id
        return None

    def _workers(self, ask: Ask, roles: tuple[Role, ...], avoid: Collection[str], now: float) -> list[WorkerView]:
        """Workers that take new work; if none does, those whose breaker is open: better a trial than no answer."""
        views = self._fleet.usable(roles, now)
        if not views:
            views = [view for view in self._fleet.alive(roles) if view.claimed_by is None]
        sound = [view for view in views if not self._fleet.quarantine.holds(view.worker_id, now)]
        return [view for view in sound if view.worker_id not in avoid and understands(view, ask)]

    def _partners(self, prefill: str, views: list[WorkerView], now: float) -> list[WorkerView]:
        """Those to which this prefill worker can hand over."""
        sender = self._fleet.workers.get(prefill)
        return views if sender is None else [view for view in views if self._hands_over(sender.welcome, view, now)]

    def _hands_over(self, sender: Welcome, receiver: WorkerView, now: float) -> bool:
        """Whether KV can go from one to the other, and has not just failed to."""
        apart = not self._fleet.pairs.closed(sender.worker_id, receiver.worker_id, now)
        return not apart and _exchange(sender, receiver.welcome)

    def _score(
        self, ask: Ask, phase: Phase, views: list[WorkerView], held: dict[str, int], now: float
    ) -> list[tuple[float, Candidate]]:
        """Candidates, cheapest first; equals in random order, so that routers with equal beliefs spread."""
        views = self._sampled(views, held)
        work = [self._fleet.recent_work(view, now) for view in views]
        least = min(work, default=0.0)
        fastest = max((view.prefill_per_s or 0.0 for view in self._fleet.workers.values()), default=0.0)
        candidates = [
            self._candidate(ask, phase, view, held, done - least, _slowness(view, fastest))
            for view, done in zip(views, work, strict=True)
        ]
        scored = [(self._policy.cost(each), self._draw(), each) for each in candidates]
        scored.sort(key=lambda entry: entry[:2])
        return [(cost, each) for cost, _, each in scored]

    def _sampled(self, views: list[WorkerView], held: dict[str, int]) -> list[WorkerView]:
        """The best prefix owner and a few random others, where the fleet is large and its load data stale."""
        wanted = self._settings.sample
        if not wanted or len(views) <= wanted + 1:
            return views
        owner = max(range(len(views)), key=lambda i: held.get(views[i].worker_id, 0))
        rest = [i for i in range(len(views)) if i != owner]
        rest.sort(key=lambda _: self._draw())
        return [views[i] for i in (owner, *rest[:wanted])]

    def _candidate(
        self,
        ask: Ask,
        phase: Phase,
        view: WorkerView,
        held: dict[str, int],
        recent_work: float = 0.0,
        slowness: float = 1.0,
    ) -> Candidate:
        welcome = view.welcome
        return Candidate(
            worker_id=view.worker_id,
            phase=phase,
            context_tokens=ask.context_tokens,
            uncached_tokens=self._uncached(ask, view, held),
            queued_tokens=view.queued_tokens,
            sequences=view.all_sequences,
            max_sequences=max(1, welcome.max_num_seqs),
            free_tokens=max(0, view.free_blocks * welcome.block_size - ask.growth),
            total_tokens=max(1, welcome.num_blocks * welcome.block_size),
            recent_work=recent_work,
            slowness=slowness,
        )

    def _uncached(self, ask: Ask, view: WorkerView, held: dict[str, int]) -> int:
        """At least one token is always computed."""
        return max(1, ask.context_tokens - held.get(view.worker_id, 0) * view.welcome.block_size)

    def _local(self, cost: float, candidate: Candidate, penalty: float = 1.0) -> _Scored:
        uncached = candidate.uncached_tokens
        route = Route(None, candidate.worker_id, uncached, uncached)
        return _Scored(cost + (penalty - 1.0) * candidate.slowness * uncached, route)

    def _splits(
        self, ask: Ask, prefills: list[tuple[float, Candidate]], decodes: list[Candidate], now: float
    ) -> Iterator[_Scored]:
        """For each kind of KV that meets in the fleet the cheapest prefill worker and the best partner it has."""
        tried: set[tuple[str, int]] = set()
        for prefill in prefills:
            sender = self._fleet.workers[prefill[1].worker_id].welcome
            if (kind := (sender.compatibility, sender.width)) in tried:
                continue
            workers = self._fleet.workers
            fitting = (each for each in decodes if self._hands_over(sender, workers[each.worker_id], now))
            decode = next(fitting, None)
            if decode is not None:
                yield self._split(ask, prefill, decode)
            if decode is not None or not self._fleet.pairs:  # what keeps one of a kind from all need not keep another
                tried.add(kind)

    def _split(self, ask: Ask, prefill: tuple[float, Candidate], decode: Candidate) -> _Scored:
        cost, chosen = prefill
        cost += self._settings.handover_tokens
        if not decode.has_room:
            cost += _QUEUEING_CONTEXTS * ask.context_tokens
        route = Route(chosen.worker_id, decode.worker_id, chosen.uncached_tokens, decode.uncached_tokens)
        return _Scored(cost, route)

    def _is_short(self, uncached: int, view: WorkerView) -> bool:
        """Whether a prompt may be computed where others decode: by itself, and with what waits there."""
        step, cap = view.welcome.max_num_batched_tokens, self._settings.local_prefill_tokens
        longest = step if cap is None else cap
        return uncached <= longest and uncached + view.queued_tokens <= max(step, longest)

    def _local_on_decode(
        self, ask: Ask, prefill_lives: bool, avoid: Collection[str], held: dict[str, int], now: float
    ) -> list[_Scored]:
        """Decode workers prefill what is short and fits their next step beside what waits there; everything when nobody
        else is left to do it: many short prompts would hold up decodes as one long one does.
        """
        views = self._workers(ask, (Role.DECODE,), avoid, now)
        penalty = self._settings.local_penalty if prefill_lives else 1.0
        if prefill_lives:
            views = [view for view in views if self._is_short(self._uncached(ask, view, held), view)]
        scored = self._score(ask, Phase.LOCAL, views, held, now)
        return [self._local(cost, each, penalty) for cost, each in scored[:1]]


def understands(view: WorkerView, ask: Ask) -> bool:
    """Whether the worker can be told all that the request says."""
    return view.welcome.wire_version >= ask.wire_version


def _exchange(one: Welcome, other: Welcome) -> bool:
    """Whether KV blocks of one worker mean the same at the other, and can be cut for its ranks."""
    return one.compatibility == other.compatibility and reason_against(one.width, other.width) is None


def _slowness(view: WorkerView, fastest: float) -> float:
    """Time for a prompt token against that of a worker with `fastest` tokens per second; 1 while unknown."""
    slowness = fastest / view.prefill_per_s if view.prefill_per_s else 1.0
    return slowness if slowness > _AS_FAST else 1.0
