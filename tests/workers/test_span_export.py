"""The exporter: spans arrive whole, wait in bounds, and nobody waits for a collector that is away."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator

import pytest
from fakes.otlp_receiver import OtlpReceiver

from penstock.workers.settings import TracingSettings
from penstock.workers.span_export import OtlpSink, traces_url
from penstock.workers.spans import Span, below, open_sink
from penstock.workers.trace_context import TraceContext

ROOT = TraceContext(0xABC, 0xDEF)


@pytest.fixture
def silent() -> Iterator[str]:
    """An endpoint that accepts and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def span(number: int = 0) -> Span:
    now = time.monotonic()
    return below(ROOT, "prefill", now, now + 0.5, str(number), attributes={"a": 1, "b": "x"}, events=(("e", now),))


def test_off_is_nothing() -> None:
    assert open_sink(TracingSettings(), "w") is None


def test_a_span_arrives_whole() -> None:
    with OtlpReceiver() as collector:
        sink = open_sink(TracingSettings(endpoint=collector.url, service_name="s"), "decode-3")
        assert sink is not None
        before = time.time_ns()
        sink.take(span())
        sink.take(Span("http", ROOT, 0, 1.0, 0.5, error="status 500", server=True))
        sink.close()
        spans = {each.name: each for each in collector.until(lambda spans: len(spans) == 2)}
        assert collector.paths[0] == "/v1/traces"
    child, root = spans["prefill"], spans["http"]
    assert child.trace_id == root.trace_id == f"{0xABC:032x}"
    assert (child.parent_id, root.span_id, root.parent_id) == (f"{0xDEF:016x}", f"{0xDEF:016x}", "")
    assert child.part == "decode-3"
    assert child.attributes == {"a": 1, "b": "x"}
    assert abs(child.began - before) < 1_000_000_000
    assert abs(child.ended - child.began - 500_000_000) < 1000
    assert child.events["e"] == child.began
    assert root.error == "status 500"
    assert root.ended == root.began  # an end before the beginning cannot be


def test_the_queue_is_bounded_and_taking_never_waits(silent: str) -> None:
    sink = OtlpSink(TracingSettings(endpoint=silent, max_queue=600, export_interval_s=0.01), "w")
    began = time.monotonic()
    for number in range(5000):
        sink.take(span(number))
    assert time.monotonic() - began < 3.0
    assert sink.dropped >= 5000 - 600 - 2 * 512
    began = time.monotonic()
    sink.close()
    assert time.monotonic() - began < 4.0


def test_a_collector_that_refuses_costs_the_spans_only(caplog: pytest.LogCaptureFixture) -> None:
    with OtlpReceiver(status=400) as collector:
        sink = OtlpSink(TracingSettings(endpoint=collector.url, export_interval_s=0.01), "w")
        for _ in range(3):
            sink.take(span())
            time.sleep(0.05)
        sink.close()
    assert sink.dropped == 3
    assert len([record for record in caplog.records if "spans cannot be sent" in record.message]) == 1


@pytest.mark.parametrize(
    ("endpoint", "url"),
    [
        ("http://c:4318", "http://c:4318/v1/traces"),
        ("http://c:4318/", "http://c:4318/v1/traces"),
        ("https://c/otlp/v1/traces", "https://c/otlp/v1/traces"),
    ],
)
def test_urls(endpoint: str, url: str) -> None:
    assert traces_url(endpoint) == url
