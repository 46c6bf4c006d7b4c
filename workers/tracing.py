"""A worker's spans of the requests that are traced: prefill, kv_transfer, reserve, decode; see `cluster/tracing.py`.

`observation.py` reports what happens, on the engine thread, for keys that `begin` took in; the parent of every span is
the router's attempt, whose id came with the request. Untraced requests cost nothing here.

Invariant: what is kept is bounded by the sequences and sending sessions that are alive.
"""

from __future__ import annotations

from dataclasses import dataclass

from penstock.workers.protocol import EndReason, FailureCode, GenerateRequest
from penstock.workers.scheduler.events import SequenceKey, StepOutcome, Work
from penstock.workers.spans import Span, SpanSink, Value, below
from penstock.workers.totals import TransferCause
from penstock.workers.trace_context import TraceContext, sampled_parent


@dataclass(slots=True)
class _Traced:
    """One sequence that is alive. Times are the engine's clock."""

    parent: TraceContext
    work: Work
    received: float
    tokens: int  # of its context
    cached: int = 0
    granted: float | None = None
    started: float | None = None
    arrived: float | None = None  # its KV, from a peer
    first: float | None = None
    first_began: float = 0.0  # the step that gave the first token
    generated: int = 0


class WorkerTracer:
    """Spans of one worker into one sink."""

    def __init__(self, sink: SpanSink, worker_id: str) -> None:
        self._sink = sink
        self._worker_id = worker_id
        self._traced: dict[SequenceKey, _Traced] = {}
        self._unstarted: dict[SequenceKey, None] = {}  # those whose first token is still to come
        self._transfers: dict[SequenceKey, TraceContext] = {}

    @property
    def active(self) -> bool:
        """Some sequence is traced."""
        return bool(self._traced)

    @property
    def dropped(self) -> int:
        """Spans that were lost so far."""
        return self._sink.dropped

    def begin(self, key: SequenceKey, work: Work, request: GenerateRequest, now: float) -> None:
        """A traced request came in."""
        parent = sampled_parent(request.traceparent)
        if parent is None:
            return
        self._traced[key] = _Traced(parent, work, now, request.context_length)
        self._unstarted[key] = None
        if work is Work.PREFILL:
            self._transfers[key] = parent

    def granted(self, key: SequenceKey, cached: int, now: float) -> None:
        """Its blocks are reserved."""
        traced = self._traced.get(key)
        if traced is not None:
            traced.granted = now
            traced.cached = cached
            facts: dict[str, Value] = {"penstock.cached_tokens": cached}
            self._take(traced, "reserve", traced.received, now, attributes=facts)

    def started(self, key: SequenceKey, cached: int, now: float) -> None:
        """Its prefill begins."""
        traced = self._traced.get(key)
        if traced is not None:
            traced.started = now
            traced.cached = cached

    def arrived(self, key: SequenceKey, now: float) -> None:
        """Its KV is here."""
        traced = self._traced.get(key)
        if traced is not None:
            traced.arrived = now

    def rows(self, outcome: StepOutcome, began: float, ended: float) -> None:
        """A step gave tokens: look for first ones, and for ends."""
        names = outcome.router_ids
        rows = range(len(outcome.tokens)) if self._unstarted else outcome.ends.nonzero()[0].tolist()
        for row in rows:
            router = names[int(outcome.router_index[row])]
            key = SequenceKey(router, int(outcome.slots[row]), int(outcome.attempts[row]))
            traced = self._traced.get(key)
            if traced is None:
                continue
            traced.generated = int(outcome.starts[row]) + 1
            if key in self._unstarted:
                self._first_token(key, traced, began, ended)
            end = int(outcome.ends[row])
            if end:
                self._ended(key, traced, ended, EndReason(end).name.lower())

    def sent(
        self, key: SequenceKey, times: tuple[float, float], size: tuple[int, int], cause: TransferCause | None
    ) -> None:
        """Its KV has been sent, or not for this cause. `size`: blocks and bytes of the session."""
        parent = self._transfers.pop(key, None)
        if parent is None or cause is TransferCause.ABANDONED:
            return
        facts: dict[str, Value] = {
            "penstock.worker": self._worker_id,
            "penstock.kv.blocks": size[0],
            "penstock.kv.bytes": size[1],
        }
        span = below(parent, "kv_transfer", *times, self._worker_id, attributes=facts, error=cause or "")
        self._sink.take(span)

    def over(self, key: SequenceKey, code: FailureCode | str, now: float) -> None:
        """It ended without a row: failed, cancelled, or (no code) with tokens that came along with its KV."""
        traced = self._traced.get(key)
        if traced is None:
            return
        if traced.work is Work.RESERVE and traced.arrived is None:
            if traced.granted is None:
                self._take(traced, "reserve", traced.received, now, error=code)
            self._forget(key)
        elif traced.work is not Work.RESERVE and traced.first is None:
            self._prefilled(traced, now, code)
            self._forget(key)
        else:
            self._ended(key, traced, now, "", code)

    # --------------------------------------------------------------------------------------------------------------

    def _first_token(self, key: SequenceKey, traced: _Traced, began: float, ended: float) -> None:
        del self._unstarted[key]
        traced.first, traced.first_began = ended, began
        if traced.work is not Work.RESERVE:
            self._prefilled(traced, ended)
        if traced.work is Work.PREFILL:
            self._traced.pop(key, None)

    def _prefilled(self, traced: _Traced, now: float, error: str = "") -> None:
        facts: dict[str, Value] = {
            "gen_ai.usage.input_tokens": traced.tokens,
            "gen_ai.usage.cache_read.input_tokens": traced.cached,
        }
        prefill = self._take(traced, "prefill", traced.received, now, attributes=facts, error=error)
        started = now if traced.started is None else traced.started
        self._sink.take(below(prefill, "queue", traced.received, started))
        if traced.started is not None:
            self._sink.take(below(prefill, "compute", started, now))

    def _ended(self, key: SequenceKey, traced: _Traced, now: float, reason: str, error: str = "") -> None:
        """The decode phase, where there was one."""
        self._forget(key)
        local = traced.first if traced.work is Work.GENERATE else None
        began = traced.arrived if local is None else local
        if began is None:
            return  # a prefill that ended at its first token
        facts: dict[str, Value] = {"gen_ai.usage.output_tokens": traced.generated}
        if reason:
            facts["gen_ai.response.finish_reasons"] = (reason,)
        events: tuple[tuple[str, float], ...] = (("last_token", now),)
        if traced.first is not None:
            events = (("first_token", traced.first), *events)
        decode = self._take(traced, "decode", began, now, attributes=facts, events=events, error=error)
        if traced.arrived is not None:
            until = traced.first_began if traced.first is not None else now
            self._sink.take(below(decode, "queue", began, max(began, until)))

    def _forget(self, key: SequenceKey) -> None:
        self._traced.pop(key, None)
        self._unstarted.pop(key, None)

    def _take(
        self,
        traced: _Traced,
        name: str,
        began: float,
        ended: float,
        *,
        attributes: dict[str, Value] | None = None,
        events: tuple[tuple[str, float], ...] = (),
        error: str = "",
    ) -> TraceContext:
        facts: dict[str, Value] = {"penstock.worker": self._worker_id, **(attributes or {})}
        span: Span = below(
            traced.parent, name, began, ended, self._worker_id, attributes=facts, events=events, error=error
        )
        self._sink.take(span)
        return span.context
