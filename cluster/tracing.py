"""Spans of the ingress: one per HTTP request, one per choice's way through the router, one per attempt.

Per trace, with who emits it:

    http                       ingress, per HTTP request; child of the caller's span where it sent a `traceparent`
      route                    ingress, per choice: from submission to its end
        attempt                ingress, per attempt; carries the workers and why it ended. Parent of the workers' spans:
          prefill  queue, compute                    the worker that prefills
          kv_transfer                                the worker that sends KV
          reserve                                    the worker that grants blocks
          decode   queue; first and last token       the worker that decodes

`Stopwatch` begins and ends the first, the router's reports (`IngressTracer.report`) give the others, and the workers'
`tracing.py` theirs. Ids below `http` are derived (`workers/trace_context.py`), so that nothing waits for a span.
Sampling is parent-based: a caller's sampled flag decides, else `tracing.sample_ratio` by the trace id.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

from penstock.cluster.ledger.recorder import Ledger
from penstock.cluster.metrics import Metrics
from penstock.router.journey import COMPLETED, RequestReport
from penstock.router.trail import MOVED_LIVE, attempt_context, route_context
from penstock.workers.settings import TracingSettings
from penstock.workers.spans import Span, SpanSink, Value, open_sink
from penstock.workers.trace_context import TraceContext, is_trace_header, sampled_parent

_ID_SPACE = 1 << 64
Observe = Callable[[RequestReport], None]


class IngressTracer:
    """Spans of one ingress process into one sink."""

    def __init__(self, sink: SpanSink, sample_ratio: float, entropy: Callable[[int], bytes] = os.urandom) -> None:
        self._sink = sink
        self._bound = round(sample_ratio * _ID_SPACE)
        self._entropy = entropy

    @property
    def dropped(self) -> int:
        """Spans that were lost so far."""
        return self._sink.dropped

    def begin(self, traceparent: str) -> TraceContext | None:
        """The span of an HTTP request that came with this header (empty: with none); None: not traced."""
        if is_trace_header(traceparent):
            parent = sampled_parent(traceparent)
            return parent and TraceContext(parent.trace_id, self._random(8))
        trace_id = self._random(16)
        if trace_id % _ID_SPACE >= self._bound:
            return None
        return TraceContext(trace_id, self._random(8))

    def end(
        self,
        context: TraceContext,
        traceparent: str,
        times: tuple[float, float],
        attributes: Mapping[str, Value],
        failed: str = "",
    ) -> None:
        """The HTTP request is over; `times` are its monotonic begin and end."""
        parent = sampled_parent(traceparent)
        parent_id = parent.span_id if parent is not None else 0
        span = Span("http", context, parent_id, *times, attributes=attributes, error=failed, server=True)
        self._sink.take(span)

    def report(self, report: RequestReport) -> None:
        """One choice is over."""
        route = route_context(report.traceparent, report.request_id)
        parent = sampled_parent(report.traceparent)
        if route is None or parent is None:
            return
        arrived, times = report.trail.arrived, report.trail.times
        events = tuple((stage, arrived + at) for stage, at in times.items() if stage != "ended")
        error = "" if report.terminal == COMPLETED else report.terminal
        ended = arrived + times.get("ended", 0.0)
        self._sink.take(Span("route", route, parent.span_id, arrived, ended, _choice(report), events, error))
        for attempt in report.trail.attempts:
            span = Span(
                "attempt",
                attempt_context(route, attempt.number),
                route.span_id,
                arrived + attempt.began,
                arrived + (times["ended"] if attempt.ended is None else attempt.ended),
                {
                    "penstock.attempt": attempt.number,
                    "penstock.choice": attempt.choice,
                    "penstock.worker.prefill": attempt.prefill or "",
                    "penstock.worker.decode": attempt.decode or "",
                    "penstock.phase": attempt.phase,
                },
                tuple((stage, arrived + at) for stage, at in attempt.times.items() if stage != "ended"),
                "" if attempt.end in (COMPLETED, MOVED_LIVE) else attempt.end,
            )
            self._sink.take(span)

    def close(self) -> None:
        """Send what waits."""
        self._sink.close()

    def _random(self, size: int) -> int:
        return int.from_bytes(self._entropy(size), "big") or 1


def open_tracer(settings: TracingSettings) -> IngressTracer | None:
    """The tracer of this ingress process; None where tracing is off. Raises ConfigError."""
    sink = open_sink(settings, "ingress")
    return IngressTracer(sink, settings.sample_ratio) if sink is not None else None


def observing(metrics: Metrics, tracer: IngressTracer | None, ledger: Ledger | None = None) -> Observe:
    """The one observer of a router's reports: all of these hear each of them."""
    hearers = [metrics.report]
    if tracer is not None:
        hearers.append(tracer.report)
    if ledger is not None:
        hearers.append(ledger.report)

    def observe(report: RequestReport) -> None:
        for hear in hearers:
            hear(report)

    return observe


def _choice(report: RequestReport) -> dict[str, Value]:
    """What a choice was, in the new names and the ones that vLLM still uses."""
    times = report.trail.times
    facts: dict[str, Value] = {
        "gen_ai.request.id": report.request_id,
        "gen_ai.usage.input_tokens": report.prompt_tokens,
        "gen_ai.usage.prompt_tokens": report.prompt_tokens,
        "gen_ai.usage.output_tokens": report.generated_tokens,
        "gen_ai.usage.completion_tokens": report.generated_tokens,
        "gen_ai.usage.cache_read.input_tokens": report.cached_tokens,
        "gen_ai.latency.e2e": times.get("ended", 0.0),
        "penstock.terminal": report.terminal,
        "penstock.attempts": report.attempts,
        "penstock.migrations": report.migrations,
    }
    if "started" in times:
        facts["gen_ai.latency.time_in_queue"] = times["started"]
    if "first_token" in times:
        facts["gen_ai.latency.time_to_first_token"] = times["first_token"]
    return facts
