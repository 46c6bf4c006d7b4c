"""One request is one trace: every span of ingress and workers hangs where it should, over real processes."""

from __future__ import annotations

import asyncio
import subprocess
import sys

import pytest
from fakes.observed_cluster import DECODE, MIXED, PREFILL, ObservedCluster
from fakes.otlp_receiver import OtlpReceiver, ReceivedSpan

from penstock.cluster.tracing import IngressTracer
from penstock.router.trail import attempt_context, route_context
from penstock.workers.settings import TracingSettings
from penstock.workers.spans import Span
from penstock.workers.trace_context import TraceContext, sampled_parent

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
UNSAMPLED = PARENT[:-2] + "00"


class Kept:
    """A sink that keeps."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.dropped = 0

    def take(self, span: Span) -> None:
        self.spans.append(span)

    def close(self) -> None:
        pass


def has(*names: str) -> object:
    return lambda spans: set(names) <= {span.name for span in spans}


def only(spans: list[ReceivedSpan], name: str) -> ReceivedSpan:
    (found,) = [span for span in spans if span.name == name]
    return found


def check_family(spans: list[ReceivedSpan]) -> None:
    """All of one trace, every id once, parents known and no child outside its parent's time (but for the clocks of
    processes, which agree to a millisecond)."""
    assert len({span.trace_id for span in spans}) == 1
    by_id = {span.span_id: span for span in spans}
    assert len(by_id) == len(spans)
    for span in spans:
        assert span.began <= span.ended
        parent = by_id.get(span.parent_id)
        if parent is not None:
            slack = 0 if parent.part == span.part else 2_000_000
            assert parent.began - slack <= span.began, (span, parent)


def parent_of(spans: list[ReceivedSpan], span: ReceivedSpan) -> str:
    return next((each.name for each in spans if each.span_id == span.parent_id), "")


@pytest.mark.timeout(60)
async def trace_of(roles: list[object], *wanted: str, **body: object) -> list[ReceivedSpan]:
    with OtlpReceiver() as collector:
        async with ObservedCluster(roles, tracing=TracingSettings(endpoint=collector.url)) as observed:
            answer = await observed.complete(range(1, 400), {"traceparent": PARENT}, **body)
            assert answer.status_code == 200
            return await asyncio.to_thread(collector.until, has(*wanted))


def test_split_request_is_one_trace() -> None:
    names = ("http", "route", "attempt", "reserve", "prefill", "compute", "kv_transfer", "decode", "queue")
    spans = asyncio.run(trace_of([PREFILL, DECODE], *names))
    check_family(spans)
    assert {span.trace_id for span in spans} == {PARENT.split("-")[1]}
    http = only(spans, "http")
    assert http.parent_id == PARENT.split("-")[2]
    assert http.part == "ingress"
    assert parent_of(spans, only(spans, "route")) == "http"
    assert parent_of(spans, only(spans, "attempt")) == "route"
    for name, part in (("reserve", "decode-1"), ("prefill", "prefill-0"), ("kv_transfer", "prefill-0")):
        assert (parent_of(spans, only(spans, name)), only(spans, name).part) == ("attempt", part)
    decode = only(spans, "decode")
    assert (parent_of(spans, decode), decode.part) == ("attempt", "decode-1")
    assert {"first_token", "last_token"} == set(decode.events)
    assert sorted(parent_of(spans, span) for span in spans if span.name == "queue") == ["decode", "prefill"]
    assert parent_of(spans, only(spans, "compute")) == "prefill"
    transfer = only(spans, "kv_transfer")
    assert transfer.attributes["penstock.kv.blocks"] == 25
    assert transfer.attributes["penstock.kv.bytes"] > 0
    route = only(spans, "route").attributes
    assert route["gen_ai.usage.input_tokens"] == route["gen_ai.usage.prompt_tokens"] == 399
    assert route["gen_ai.usage.output_tokens"] == 8
    assert only(spans, "prefill").attributes["gen_ai.usage.input_tokens"] == 399
    assert http.attributes["gen_ai.request.model"] == "oracle-model"
    assert http.attributes["http.route"] == "/v1/completions"
    assert http.attributes["gen_ai.request.max_tokens"] == 8


def test_mixed_request_is_one_trace_without_a_transfer() -> None:
    spans = asyncio.run(trace_of([MIXED], "http", "route", "attempt", "prefill", "compute", "decode", stream=True))
    check_family(spans)
    assert {"kv_transfer", "reserve"}.isdisjoint(span.name for span in spans)
    assert {parent_of(spans, span) for span in spans if span.name in ("prefill", "decode")} == {"attempt"}
    assert only(spans, "decode").attributes["gen_ai.usage.output_tokens"] == 8


@pytest.mark.timeout(60)
def test_a_killed_worker_shows_as_a_second_attempt() -> None:
    async def run() -> list[ReceivedSpan]:
        with OtlpReceiver() as collector:
            tracing = TracingSettings(endpoint=collector.url)
            async with ObservedCluster([PREFILL, DECODE, DECODE], tracing=tracing, step_s=0.02) as observed:
                asking = asyncio.ensure_future(observed.complete(range(1, 200), max_tokens=60))
                observed.cluster.kill(await busy_decode(observed))
                answer = await asking
                assert answer.status_code == 200
                assert answer.json()["usage"]["completion_tokens"] == 60
                page = await observed.scrape()
                assert 'penstock_request_migrated_total{model_name="oracle-model",phase="decode"} 1.0' in page
                return await asyncio.to_thread(collector.until, has("http", "route", "decode"))

    spans = asyncio.run(run())
    check_family([span for span in spans if span.trace_id == only(spans, "http").trace_id])
    attempts = sorted(
        (span for span in spans if span.name == "attempt"), key=lambda s: s.attributes["penstock.attempt"]
    )
    assert [span.error for span in attempts] == ["worker_lost", ""]
    assert [parent_of(spans, span) for span in attempts] == ["route", "route"]
    assert attempts[0].attributes["penstock.worker.decode"] != attempts[1].attributes["penstock.worker.decode"]
    assert only(spans, "decode").parent_id == attempts[1].span_id  # the first one died with its worker
    assert len([span for span in spans if span.name == "prefill"]) == 2


async def busy_decode(observed: ObservedCluster) -> str:
    """A decode worker, as soon as one streams."""
    for _ in range(1000):
        for journey in observed.cluster.generator.router._journeys:
            if journey.emission.count > 5 and journey.route is not None:
                return journey.route.decode or ""
        await asyncio.sleep(0.01)
    raise TimeoutError("nothing streams")


@pytest.mark.timeout(60)
def test_a_collector_that_is_away_changes_nothing() -> None:
    async def run() -> None:
        async with ObservedCluster(
            [PREFILL, DECODE], tracing=TracingSettings(endpoint="http://127.0.0.1:9")
        ) as observed:
            answers = await asyncio.gather(*(observed.complete(range(1, 50 + n)) for n in range(20)))
            assert {answer.status_code for answer in answers} == {200}

    asyncio.run(run())


@pytest.mark.timeout(60)
def test_unsampled_and_ratio_zero_trace_nothing() -> None:
    async def run() -> None:
        with OtlpReceiver() as collector:
            tracing = TracingSettings(endpoint=collector.url, sample_ratio=0.0)
            async with ObservedCluster([MIXED], tracing=tracing) as observed:
                await observed.complete([1, 2, 3])
                await observed.complete([1, 2, 3], {"traceparent": UNSAMPLED})
                await observed.complete([1, 2, 3], {"traceparent": "00-" + "0" * 32 + "-" + "0" * 16 + "-01"})
                await observed.complete([1, 2, 3], {"traceparent": PARENT})
                spans = await asyncio.to_thread(collector.until, has("http", "decode"))
                assert {span.trace_id for span in spans} == {PARENT.split("-")[1]}

    asyncio.run(run())


def test_sampling_ratio_and_parents() -> None:
    sink = Kept()
    tracer = IngressTracer(sink, 0.25)
    begun = [tracer.begin("") for _ in range(2000)]
    assert 350 < sum(context is not None for context in begun) < 650
    child = tracer.begin(PARENT)
    assert child is not None
    assert child.trace_id == int(PARENT.split("-")[1], 16)
    assert child.span_id != int(PARENT.split("-")[2], 16)
    assert tracer.begin(UNSAMPLED) is None


def test_ids_are_derived_alike_on_both_ends() -> None:
    http = TraceContext(1 << 100, 77)
    route = route_context(http.header(), "cmpl-1-0")
    assert route is not None
    attempt = attempt_context(route, 2)
    assert sampled_parent(attempt.header()) == attempt
    assert len({http.span_id, route.span_id, attempt.span_id, attempt_context(route, 1).span_id}) == 4
    assert route_context("", "x") is None


@pytest.mark.timeout(60)
def test_no_tracing_library_is_imported_while_it_is_off() -> None:
    code = (
        "import sys, penstock.cluster.tracing, penstock.workers.assembly\n"
        "from penstock.workers.settings import TracingSettings\n"
        "assert penstock.cluster.tracing.open_tracer(TracingSettings()) is None\n"
        "assert not [name for name in sys.modules if name.startswith('opentelemetry')], sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=50)
