"""What happened to one request on its way through the fleet, and when: stages and attempts, for reports and traces.

Written by `journey.py` and `attempts.py`, read by metrics, traces and timing headers, also while the request runs
(through `Emission.trail`). Pure: the caller brings the time; all times are seconds since the request's arrival.

Stages, each marked when it is first reached: admitted, placed, granted, prefill_sent, started, first_token,
handed_over (the first token that the decode worker of a split made), ended. `Trail.times` holds the first time over
all attempts, `AttemptTrail.times` those of one attempt.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from penstock.workers.trace_context import TraceContext, sampled_parent

LIVE = "live"  # the choice of an attempt that goes on with the KV of the one before, which ended as `MOVED_LIVE`
MOVED_LIVE = "moved_live"
MAX_KEPT = 32  # attempts whose trail is kept; the first ones, and always the last
PHASES = ("prefill", "transfer", "decode")


@dataclass(slots=True, eq=False)
class AttemptTrail:
    """One attempt. `choice` says what kind of route it was given, out of a small closed set."""

    number: int
    prefill: str | None
    decode: str | None
    choice: str
    began: float
    decision_s: float = 0.0
    ended: float | None = None
    end: str = ""  # "completed", "moved", `MOVED_LIVE` or the value of a `FailureCode`, once it has ended
    times: dict[str, float] = field(default_factory=dict)

    @property
    def phase(self) -> str:
        """How far it came: one of `PHASES`."""
        if self.choice == LIVE:
            return "decode"
        if "first_token" not in self.times:
            return "prefill"
        split = self.prefill is not None and self.decode is not None
        return "transfer" if split and "handed_over" not in self.times else "decode"


@dataclass(slots=True, eq=False)
class Trail:
    """One request. `arrived` is on the clock of the port that serves it."""

    arrived: float = 0.0
    times: dict[str, float] = field(default_factory=dict)
    attempts: list[AttemptTrail] = field(default_factory=list)

    def mark(self, stage: str, at: float) -> None:
        """A stage was reached `at` seconds after arrival."""
        self.times.setdefault(stage, at)
        if self.attempts and self.attempts[-1].ended is None:
            self.attempts[-1].times.setdefault(stage, at)

    def begin(self, attempt: AttemptTrail) -> None:
        """An attempt begins."""
        if len(self.attempts) >= MAX_KEPT:
            self.attempts.pop()
        self.attempts.append(attempt)

    def end(self, at: float, how: str) -> None:
        """The current attempt is over. Harmless when there is none."""
        if self.attempts and self.attempts[-1].ended is None:
            self.attempts[-1].ended, self.attempts[-1].end = at, how

    @property
    def workers(self) -> tuple[str, ...]:
        """Every worker that an attempt was given to, in order of first use."""
        used = (worker for attempt in self.attempts for worker in (attempt.prefill, attempt.decode))
        return tuple(dict.fromkeys(worker for worker in used if worker is not None))


def route_context(traceparent: str, request_id: str) -> TraceContext | None:
    """The span of the request's whole way through the router; None when it is not traced."""
    parent = sampled_parent(traceparent) if traceparent else None
    return parent.child(f"route/{request_id}") if parent is not None else None


def attempt_context(route: TraceContext, number: int) -> TraceContext:
    """The span of one attempt, which the workers' spans hang on."""
    return route.child(f"attempt/{number}")
