"""Where a request goes: the pair of prefill and decode worker, or one worker for both, that costs least.

Asked by `request_path.py` through `router.py`, with what the request needs; answers with a `Route` or None. Costs come
from the policy chosen by name (`policies/`), in prefill tokens. P = D wins where a worker that decodes holds nearly
all of the context already, where the prompt is short, and where the prefilling workers are busier than that.

Pure but for the random draws passed in (ties, samples). Knows beliefs only; workers may refuse.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
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
from penstock.workers.protocol import Role
from penstock.workers.transfer.head_slices import reason_against

POLICIES: MappingProxyType[str, type[Policy]] = MappingProxyType(
    {
        "prefix_load": PrefixLoad,
        "least_loaded": LeastLoaded,
    }
)

_QUEUEING_CONTEXTS = 4.0  # a decode worker without room costs this many times the context


@dataclass(frozen=True, slots=True)
class Ask:
    """What one attempt needs."""

    context_tokens: int
    growth: int  # output tokens that need KV at first
    digests: NDArray[np.uint64]  # of the prompt's full blocks
    single: bool = False  # ends at its first token: nothing to decode


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
        prefills = self._score(ask, Phase.PREFILL, self._workers((Role.PREFILL,), avoid, now), held, now)
        decodes = self._score(ask, Phase.DECODE, self._workers((Role.DECODE,), avoid, now), held, now)
        mixed = self._workers((Role.MIXED,), avoid, now)
        options = [self._local(cost, each) for cost, each in self._score(ask, Phase.LOCAL, mixed, held, now)[:1]]
        if not decodes and prefills:
            partners = self._partners(prefills[0][1].worker_id, mixed)
            decodes = self._score(ask, Phase.DECODE, partners, held, now)
        if ask.single and prefills:
            cost, best = prefills[0]
            options.append(_Scored(cost, Route(best.worker_id, None, best.uncached_tokens, 0)))
        elif prefills and decodes:
            options.append(self._split(ask, prefills[0], decodes[0][1]))
        options += self._local_on_decode(ask, bool(prefills), avoid, held, now)
        return min(options, key=lambda option: option.cost).route if options else None

    def uncached_anywhere(self, ask: Ask, now: float) -> int:
        """Least tokens that any worker would have to compute; what the gate counts."""
        held = self._index.match(ask.digests, now)
        return min(
            (self._uncached(ask, view, held) for view in self._fleet.workers.values()), default=ask.context_tokens
        )

    def has_room_elsewhere(self, ask: Ask, route: Route, now: float, avoid: Collection[str] = ()) -> bool:
        """True when a worker like the decode worker of `route`, where the request still waits, could start it now."""
        current = self._fleet.workers.get(route.decode or "")
        if current is None:
            return False
        held = self._index.match(ask.digests, now)
        views = self._workers((Role.DECODE, Role.MIXED), (*avoid, current.worker_id), now)
        views = self._partners(route.prefill, views) if route.prefill is not None else views
        others = [self._candidate(ask, Phase.DECODE, view, held, 0.0) for view in views]
        return any(
            each.has_room and each.queued_tokens + each.uncached_tokens <= current.queued_tokens + ask.context_tokens
            for each in others
        )

    def _workers(self, roles: tuple[Role, ...], avoid: Collection[str], now: float) -> list[WorkerView]:
        """Workers that take new work; if none does, those whose breaker is open: better a trial than no answer."""
        views = self._fleet.usable(roles, now)
        if not views:
            views = [view for view in self._fleet.alive(roles) if view.claimed_by is None]
        return [view for view in views if view.worker_id not in avoid]

    def _partners(self, prefill: str, views: list[WorkerView]) -> list[WorkerView]:
        """Those to which this prefill worker can hand over: the fleet sees to it for decode workers, not for mixed."""
        sender = self._fleet.workers.get(prefill)
        if sender is None:
            return views
        return [view for view in views if reason_against(sender.welcome.width, view.welcome.width) is None]

    def _score(
        self, ask: Ask, phase: Phase, views: list[WorkerView], held: dict[str, int], now: float
    ) -> list[tuple[float, Candidate]]:
        """Candidates, cheapest first; equals in random order, so that routers with equal beliefs spread."""
        views = self._sampled(views, held)
        work = [self._fleet.recent_work(view, now) for view in views]
        least = min(work, default=0.0)
        candidates = [
            self._candidate(ask, phase, view, held, done - least) for view, done in zip(views, work, strict=True)
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
        self, ask: Ask, phase: Phase, view: WorkerView, held: dict[str, int], recent_work: float
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
        )

    def _uncached(self, ask: Ask, view: WorkerView, held: dict[str, int]) -> int:
        """At least one token is always computed."""
        return max(1, ask.context_tokens - held.get(view.worker_id, 0) * view.welcome.block_size)

    def _local(self, cost: float, candidate: Candidate, penalty: float = 1.0) -> _Scored:
        uncached = candidate.uncached_tokens
        route = Route(None, candidate.worker_id, uncached, uncached)
        return _Scored(cost + (penalty - 1.0) * uncached, route)

    def _split(self, ask: Ask, prefill: tuple[float, Candidate], decode: Candidate) -> _Scored:
        cost, chosen = prefill
        cost += self._settings.handover_tokens
        if not decode.has_room:
            cost += _QUEUEING_CONTEXTS * ask.context_tokens
        route = Route(chosen.worker_id, decode.worker_id, chosen.uncached_tokens, decode.uncached_tokens)
        return _Scored(cost, route)

    def _local_on_decode(
        self, ask: Ask, prefill_lives: bool, avoid: Collection[str], held: dict[str, int], now: float
    ) -> list[_Scored]:
        """Decode workers prefill what is short, and everything when nobody else is left to do it."""
        views = self._workers((Role.DECODE,), avoid, now)
        penalty = self._settings.local_penalty if prefill_lives else 1.0
        if prefill_lives:
            cap = self._settings.local_prefill_tokens
            views = [
                view
                for view in views
                if self._uncached(ask, view, held) <= (view.welcome.max_num_batched_tokens if cap is None else cap)
            ]
        scored = self._score(ask, Phase.LOCAL, views, held, now)
        return [self._local(cost, each, penalty) for cost, each in scored[:1]]
