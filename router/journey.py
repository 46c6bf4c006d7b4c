"""The state of one request while the router looks after it: attempts, what it holds where, deaths, and the report.

Made and advanced by `request_path.py`; decides (purely) what an interruption means. Knows no transport; the caller
brings the time.

Invariants: at most one attempt is current; each stake is closed once; the report is made once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from penstock.router.emission import Emission
from penstock.router.fleet import Stake
from penstock.router.placement import Ask, Route
from penstock.router.port import Event, Lost
from penstock.router.prefix_index import short_digests
from penstock.router.settings import RetrySettings
from penstock.router.suspicion import Death, Suspicion
from penstock.router.ticket import Ticket, growth_of
from penstock.router.trail import AttemptTrail, Trail, attempt_context, route_context
from penstock.workers.errors import PenstockError, RefusedError, RequestError
from penstock.workers.protocol import ADAPTER_WIRE_VERSION, EndReason, Failed, FailureCode, GenerateRequest

if TYPE_CHECKING:
    from penstock.router.live_moves import LiveMove

_REFUSALS = frozenset({FailureCode.QUEUE_FULL, FailureCode.DRAINING, FailureCode.TOO_LARGE, FailureCode.ADAPTER})
_HOPELESS = frozenset({FailureCode.TOO_LARGE, FailureCode.ADAPTER})  # asking the same worker again would not help
_MOST_UNLOADED = 3  # workers without a request's adapter that are tried: files that are gone are gone for most
_FINAL = frozenset({FailureCode.BAD_REQUEST, FailureCode.GRAMMAR, FailureCode.DEADLINE})
_RETRY_AFTER_S = 1.0
COMPLETED = "completed"
_MAX_ATTEMPT = 2**16 - 2  # attempts travel as uint16


class AttemptError(Exception):
    """The current attempt is over; `worker_id` is where it ended, `died` whether that worker is gone."""

    def __init__(
        self,
        worker_id: str,
        code: FailureCode,
        message: str,
        *,
        died: bool = False,
        moved: bool = False,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.worker_id = worker_id
        self.code = code
        self.message = message
        self.died = died
        self.moved = moved  # given up by us, for a worker with room
        self.refusal = code in _REFUSALS  # the worker is well, it only would not take the request
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, slots=True)
class RequestReport:
    """What became of one request. `terminal` is "completed" or the value of a `FailureCode`; `times` holds seconds
    since arrival, the first time each stage was reached."""

    request_id: str
    tenant: str
    terminal: str
    end: EndReason
    prompt_tokens: int
    generated_tokens: int
    cached_tokens: int
    predicted_cached_tokens: int | None  # what the index promised for the first attempt
    attempts: int
    migrations: int  # attempts that a worker's death or failure ended
    moves: int  # attempts given up for a worker with more room, or refused
    recomputed_tokens: int  # context to compute again after an interruption, as the index saw it
    prefill_worker: str | None
    decode_worker: str | None
    times: dict[str, float]
    trail: Trail = field(default_factory=Trail)
    traceparent: str = ""  # as the caller gave it
    live_moves: int = 0  # times it went on at another worker with its KV
    moves_stayed: int = 0  # such moves that came to nothing: it went on, or ended, where it was
    moves_failed: int = 0  # such moves in which it was lost, and computed again


@dataclass(slots=True, eq=False)
class Journey:
    """One request's way through the fleet."""

    request: GenerateRequest
    emission: Emission
    ticket: Ticket
    settings: RetrySettings
    clock: Callable[[], float]
    arrived: float = field(init=False)
    digests: NDArray[np.uint64] = field(init=False)
    attempt: int = 0
    route: Route | None = None
    stakes: dict[str, Stake] = field(default_factory=dict)
    refused: dict[str, AttemptError] = field(default_factory=dict)  # workers that said no in this round
    avoid: set[str] = field(default_factory=set)  # workers that failed this request; soft
    suspicion: Suspicion = field(init=False)
    alone_on: str | None = None  # worker claimed for a suspect
    alone_until: float = 0.0  # when it no longer waits for that worker to run empty
    internal_failures: int = 0
    failures: int = 0
    moves: int = 0
    recomputed: int = 0
    attempt_base: int = 0  # tokens emitted when the attempt began
    backoff_s: float = 0.0
    unserved_since: float | None = None  # nobody is left to serve it
    predicted_cached: int | None = None  # by the index, for the first attempt
    reported: bool = False
    cut: bool = False  # this router ends before the request does
    issued: int = 0  # attempt numbers given out
    nudge: Callable[[], None] = lambda: None  # make the request path look at `leaving` and `left`
    settled: bool = False  # it decodes where its route says
    leaving: bool = False  # it is asked to go on elsewhere, with its KV
    left: str = ""  # worker from which it has been taken over, to be told
    move: LiveMove | None = None
    live_moves: int = 0
    moves_stayed: int = 0
    moves_failed: int = 0
    stays_until: float = 0.0  # it is not to move before
    trail: Trail = field(init=False)

    def __post_init__(self) -> None:
        self.arrived = self.clock()
        self.suspicion = Suspicion(self.settings.poison_deaths)
        self.trail = self.emission.trail
        self.trail.arrived = self.arrived
        request = self.request
        # A prompt that is to be scored is computed whole: no worker is better for having its prefix.
        matches = request.cache_prefix and request.sampling.prompt_logprobs is None
        self.digests = short_digests(request.prefix_digests) if matches else np.zeros(0, np.uint64)

    @property
    def deadline(self) -> float:
        """When the caller's patience ends."""
        return self.arrived + self.settings.request_timeout_s

    @property
    def started(self) -> bool:
        """True when tokens have come out: giving up now would break a stream."""
        return self.emission.count > len(self.request.emitted)

    @property
    def progressed(self) -> bool:
        """True when the current attempt got past the point where the last one ended."""
        return self.emission.count - self.attempt_base >= self.settings.poison_clear_tokens

    def patience(self, now: float) -> float:
        """Seconds until the caller's patience ends, zero or less when it has."""
        return self.deadline - now

    def mark(self, what: str) -> None:
        """Remember when a stage was first reached."""
        self.trail.mark(what, self.clock() - self.arrived)

    def note_attempt(self, route: Route, choice: str, decided: float) -> None:
        """An attempt begins; its place was looked for since `decided`."""
        now = self.clock()
        began = decided - self.arrived
        attempt = AttemptTrail(self.attempt, route.prefill, route.decode, choice, began, max(0.0, now - decided))
        self.trail.begin(attempt)

    def note_end(self, how: str) -> None:
        """The current attempt, if there is one, is over."""
        self.trail.end(self.clock() - self.arrived, how)

    def raise_if_over(self, event: Event) -> None:
        """Raises AttemptError when the event says that its worker serves this attempt no longer."""
        body = event.body
        if isinstance(body, Lost):
            stake = self.stakes.get(event.worker_id)
            drained = stake is not None and stake.view.draining  # it was to end, and says nothing about the request
            raise AttemptError(event.worker_id, FailureCode.WORKER_LOST, body.reason, died=not drained)
        if isinstance(body, Failed):
            raise AttemptError(event.worker_id, body.code, body.message, retry_after_s=body.retry_after_s)

    def check_end(self, now: float) -> None:
        """Raises RefusedError when the caller's patience, or this router's time, is over."""
        if self.cut:
            raise RefusedError(FailureCode.DRAINING, "this server is shutting down", _RETRY_AFTER_S)
        if self.patience(now) <= 0:
            raise RefusedError(FailureCode.DEADLINE, "the request took too long")

    def check_wait(self, serves: bool, now: float) -> None:
        """Raises RefusedError when the request has waited too long for its turn, or for anybody who could serve it."""
        self.check_end(now)
        if not self.started and now - self.arrived >= self.request.queue_timeout_s:
            raise RefusedError(FailureCode.DEADLINE, "the request waited too long for its turn", _RETRY_AFTER_S)
        if serves:
            self.unserved_since = None
            return
        self.unserved_since = now if self.unserved_since is None else self.unserved_since
        if now - self.unserved_since >= self.settings.no_worker_timeout_s:
            raise RefusedError(FailureCode.NO_WORKER, "no worker is left to serve the request", _RETRY_AFTER_S)

    def refused_by_all(self) -> PenstockError | None:
        """Every candidate said no: the caller's error, or None if a stream that runs already should try again."""
        had_moved = any(cause.moved for cause in self.refused.values())
        self.refused = {worker_id: cause for worker_id, cause in self.refused.items() if not cause.moved}
        causes = list(self.refused.values())
        if causes and all(cause.code in _HOPELESS for cause in causes):
            return final_error(causes[-1])
        if self.started or had_moved:
            self.refused.clear()
            return None
        retry_after_s = max((cause.retry_after_s or _RETRY_AFTER_S for cause in causes), default=_RETRY_AFTER_S)
        return RefusedError(FailureCode.OVERLOADED, "all workers are full", retry_after_s)

    @property
    def remaining(self) -> int:
        """Tokens still to come at most."""
        return self.request.sampling.max_tokens - self.emission.count

    def ask(self) -> Ask:
        """What an attempt would need now."""
        context = len(self.request.prompt) + self.emission.count
        spoken = ADAPTER_WIRE_VERSION if self.request.adapter is not None else 0
        return Ask(context, growth_of(self.remaining), self.digests, self.remaining == 1, spoken)

    def resumed(self) -> GenerateRequest:
        """The request as the next worker must see it: with what is already out, and the time that is left.

        Prompt logprobs are asked for until all are there.
        """
        now = self.clock()
        wait_s = self.deadline - now
        if not self.started:
            wait_s = min(wait_s, self.request.queue_timeout_s - (now - self.arrived))
        sampling = self.request.sampling
        if sampling.prompt_logprobs is not None and self.emission.scored:
            sampling = dataclasses.replace(sampling, prompt_logprobs=None)
        traced = route_context(self.request.traceparent, self.request.request_id)
        return dataclasses.replace(
            self.request,
            sampling=sampling,
            emitted=tuple(self.emission.tokens),
            queue_timeout_s=max(0.001, wait_s),
            traceparent=attempt_context(traced, self.attempt).header() if traced is not None else "",
        )

    def survive(self, cause: AttemptError) -> None:
        """Take note of an attempt's end. Raises the caller's error when there is no point in another one."""
        if cause.died:
            self._note_death(cause.worker_id)
        if cause.code in _FINAL or self.failures >= self.settings.max_attempts or self.attempt >= _MAX_ATTEMPT:
            raise final_error(cause)
        if cause.refusal:
            self.moves += 1
            self.refused[cause.worker_id] = cause
            unloaded = sum(each.code is FailureCode.ADAPTER for each in self.refused.values())
            if unloaded >= _MOST_UNLOADED and not self.started:
                raise final_error(cause)
            return
        self.refused.clear()
        self.failures += 1
        self.avoid.add(cause.worker_id)
        if cause.code is FailureCode.INTERNAL:
            self.internal_failures += 1
            if self.internal_failures >= self.settings.max_internal_failures:
                raise final_error(cause)

    def _note_death(self, worker_id: str) -> None:
        """A worker of this attempt died: was it computing this request?

        Whether a queued prompt had just been started cannot be known, so whatever stood within two steps' budget of
        the front counts; a decode worker that still waited for the KV computed nothing.
        """
        stake = self.stakes.get(worker_id)
        if self.progressed:
            self.suspicion.acquit()
        if stake is None or self.route is None:
            return
        if not stake.started:
            receives = self.route.split and worker_id == self.route.decode
            if receives or stake.tokens_ahead > 2 * stake.view.welcome.max_num_batched_tokens:
                return
        self.suspicion.note(Death(worker_id, stake.view.welcome.incarnation, self.clock()))

    def next_backoff(self, draw: float) -> float:
        """Exponential, jittered pause before the next attempt; none after a mere refusal while others are left."""
        settings = self.settings
        self.backoff_s = min(settings.max_backoff_s, max(settings.first_backoff_s, 2 * self.backoff_s))
        return self.backoff_s * (0.5 + draw)

    def report(self, terminal: str) -> RequestReport:
        """The final account."""
        route = self.route
        return RequestReport(
            request_id=self.request.request_id,
            tenant=self.request.tenant,
            terminal=terminal,
            end=self.emission.end,
            prompt_tokens=len(self.request.prompt),
            generated_tokens=self.emission.count,
            cached_tokens=self.emission.cached_tokens,
            predicted_cached_tokens=self.predicted_cached,
            attempts=self.attempt,
            migrations=self.failures,
            moves=self.moves,
            recomputed_tokens=self.recomputed,
            prefill_worker=route.computes if route else None,
            decode_worker=route.decode if route else None,
            times=self.trail.times,
            trail=self.trail,
            traceparent=self.request.traceparent,
            live_moves=self.live_moves,
            moves_stayed=self.moves_stayed,
            moves_failed=self.moves_failed,
        )


def final_error(cause: AttemptError) -> PenstockError:
    """What the caller is told when an attempt's end is the request's end."""
    if cause.code is FailureCode.BAD_REQUEST:
        return RequestError(cause.message)
    return RefusedError(cause.code, cause.message, cause.retry_after_s or _RETRY_AFTER_S)
