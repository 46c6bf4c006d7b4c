"""Sends finished spans to an OpenTelemetry collector over OTLP/HTTP; the only file that imports the tracing library.

Loaded by `spans.open_sink` where an endpoint is configured. Spans wait in a bounded queue for a thread of their own,
which also puts them into the library's form. Our own batching, not the library's: that one writes a log line for every
span it drops and cannot be closed in bounded time while the collector is down.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from urllib.parse import urlsplit

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.trace.export import SpanExportResult
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags

from penstock.workers.settings import TracingSettings
from penstock.workers.spans import Span, wall_offset

log = logging.getLogger(__name__)

_SCOPE = InstrumentationScope("penstock")
_FLAGS = TraceFlags(TraceFlags.SAMPLED)
_BATCH = 512
_EXPORT_TIMEOUT_S = 5.0
_LAST_WORDS_S = 1.0
_COMPLAIN_EVERY_S = 60.0
_CLOCK_SET_S = 0.001


class OtlpSink:
    """See `spans.SpanSink`. `dropped` counts spans that found the queue full or the collector away."""

    def __init__(self, settings: TracingSettings, part: str) -> None:
        instance = f"{part}/{os.getpid()}"
        self._resource = Resource.create(
            {"service.name": settings.service_name, "service.instance.id": instance, "penstock.part": part}
        )
        # What it says about a collector that is away, it says every few seconds.
        logging.getLogger("opentelemetry.exporter").setLevel(logging.CRITICAL)
        self._exporter = OTLPSpanExporter(endpoint=traces_url(settings.endpoint), timeout=_EXPORT_TIMEOUT_S)
        self._interval_s = settings.export_interval_s
        self._max_queue = settings.max_queue
        self._queue: deque[Span] = deque()
        self._wake = threading.Event()
        self._closing = False
        self._offset = wall_offset()
        self._complained = 0.0
        self.dropped = 0
        self._thread = threading.Thread(target=self._run, name="spans", daemon=True)
        self._thread.start()

    def take(self, span: Span) -> None:
        """Queue one span, from any thread; dropped when the queue is full."""
        if len(self._queue) >= self._max_queue:
            self.dropped += 1
            return
        self._queue.append(span)
        if len(self._queue) >= _BATCH:
            self._wake.set()

    def close(self) -> None:
        """Send what waits; a collector that does not answer is given a second."""
        self._closing = True
        self._wake.set()
        self._thread.join(_LAST_WORDS_S)
        self._queue.clear()
        self._exporter.shutdown()  # type: ignore[no-untyped-call]

    def _run(self) -> None:
        while not self._closing:
            self._wake.wait(self._interval_s)
            self._wake.clear()
            while self._queue:
                self._send([self._queue.popleft() for _ in range(min(_BATCH, len(self._queue)))])

    def _send(self, spans: list[Span]) -> None:
        offset = self._wall_offset()
        try:
            sent = self._exporter.export([self._readable(span, offset) for span in spans]) is SpanExportResult.SUCCESS
        except Exception:  # the edge to a library and a network: no trace is worth a request
            log.debug("exporting spans failed", exc_info=True)
            sent = False
        if not sent:
            self.dropped += len(spans)
            if not self._closing:
                self._complain()

    def _complain(self) -> None:
        now = time.monotonic()
        if not self._complained or now - self._complained > _COMPLAIN_EVERY_S:
            self._complained = now
            log.warning("spans cannot be sent, the collector does not take them; %d were dropped", self.dropped)

    def _wall_offset(self) -> float:
        """The same for all spans of the process, so that children lie within their parents, until the clock is set."""
        offset = wall_offset()
        if abs(offset - self._offset) > _CLOCK_SET_S:
            self._offset = offset
        return self._offset

    def _readable(self, span: Span, offset: float) -> ReadableSpan:
        parent = _context(span.context.trace_id, span.parent_id) if span.parent_id else None
        return ReadableSpan(
            name=span.name,
            context=_context(span.context.trace_id, span.context.span_id),
            parent=parent,
            resource=self._resource,
            attributes=dict(span.attributes),
            events=[Event(name, timestamp=_nanoseconds(at + offset)) for name, at in span.events],
            kind=SpanKind.SERVER if span.server else SpanKind.INTERNAL,
            status=Status(StatusCode.ERROR, span.error) if span.error else Status(StatusCode.UNSET),
            start_time=_nanoseconds(span.began + offset),
            end_time=_nanoseconds(max(span.began, span.ended) + offset),
            instrumentation_scope=_SCOPE,
        )


def traces_url(endpoint: str) -> str:
    """The address spans are posted to: the endpoint, with OTLP's own path where it names none."""
    return endpoint if urlsplit(endpoint).path.strip("/") else endpoint.rstrip("/") + "/v1/traces"


def _context(trace_id: int, span_id: int) -> SpanContext:
    return SpanContext(trace_id, span_id, is_remote=False, trace_flags=_FLAGS)


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)
