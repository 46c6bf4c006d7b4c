"""A worker's spans when things do not go their usual way; the usual ways are in tests/cluster/test_tracing.py."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from penstock.workers.protocol import EndReason, FailureCode, GenerateRequest, SamplingParams
from penstock.workers.scheduler.events import SequenceKey, StepOutcome, Work
from penstock.workers.spans import Span
from penstock.workers.totals import TransferCause
from penstock.workers.trace_context import TraceContext
from penstock.workers.tracing import WorkerTracer

PARENT = TraceContext(1, 2)
REQUEST = GenerateRequest("r", (1, 2, 3), SamplingParams(4), traceparent=PARENT.header())
KEY = SequenceKey("router", 7, 1)


class Kept:
    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.dropped = 0

    def take(self, span: Span) -> None:
        self.spans.append(span)

    def close(self) -> None:
        pass

    def named(self, name: str) -> list[Span]:
        return [span for span in self.spans if span.name == name]


@pytest.fixture
def kept() -> Kept:
    return Kept()


@pytest.fixture
def tracer(kept: Kept) -> WorkerTracer:
    return WorkerTracer(kept, "w")


def rows(*entries: tuple[SequenceKey, int, EndReason]) -> StepOutcome:
    """(key, index of the token, end) each."""
    return StepOutcome(
        ("other", "router"),
        np.array([1] * len(entries), np.int32),
        np.array([key.slot for key, _, _ in entries], np.uint32),
        np.array([key.attempt for key, _, _ in entries], np.uint16),
        np.array([start for _, start, _ in entries], np.uint32),
        np.zeros(len(entries), np.int32),
        np.array([end for _, _, end in entries], np.uint8),
    )


def test_an_untraced_request_leaves_nothing(tracer: WorkerTracer, kept: Kept) -> None:
    tracer.begin(KEY, Work.GENERATE, dataclasses.replace(REQUEST, traceparent="00-nonsense"), 1.0)
    assert not tracer.active
    tracer.rows(rows((KEY, 0, EndReason.STOP)), 1.0, 2.0)
    tracer.over(KEY, FailureCode.CANCELLED, 2.0)
    tracer.sent(KEY, (1.0, 2.0), (1, 1), None)
    assert kept.spans == []


def test_a_request_refused_in_the_queue_has_a_failed_prefill(tracer: WorkerTracer, kept: Kept) -> None:
    tracer.begin(KEY, Work.PREFILL, REQUEST, 1.0)
    tracer.over(KEY, FailureCode.DEADLINE, 3.0)
    (prefill,), (queue,) = kept.named("prefill"), kept.named("queue")
    assert (prefill.error, prefill.parent_id) == ("deadline", PARENT.span_id)
    assert (queue.began, queue.ended, queue.parent_id) == (1.0, 3.0, prefill.context.span_id)
    assert kept.named("compute") == []
    assert not tracer.active


def test_a_reservation_that_is_never_granted(tracer: WorkerTracer, kept: Kept) -> None:
    tracer.begin(KEY, Work.RESERVE, REQUEST, 1.0)
    tracer.over(KEY, FailureCode.QUEUE_FULL, 1.5)
    assert [(span.name, span.error) for span in kept.spans] == [("reserve", "queue_full")]


def test_kv_that_never_comes(tracer: WorkerTracer, kept: Kept) -> None:
    tracer.begin(KEY, Work.RESERVE, REQUEST, 1.0)
    tracer.granted(KEY, 16, 2.0)
    tracer.over(KEY, FailureCode.TRANSFER_FAILED, 9.0)
    assert [(span.name, span.error) for span in kept.spans] == [("reserve", "")]
    assert not tracer.active


def test_a_decode_that_is_cancelled(tracer: WorkerTracer, kept: Kept) -> None:
    tracer.begin(KEY, Work.RESERVE, REQUEST, 1.0)
    tracer.granted(KEY, 0, 1.0)
    tracer.arrived(KEY, 2.0)
    tracer.rows(rows((KEY, 1, EndReason.NONE)), 2.25, 2.5)
    tracer.rows(rows((KEY, 2, EndReason.NONE)), 2.5, 2.75)
    tracer.over(KEY, FailureCode.CANCELLED, 3.0)
    (decode,), (queue,) = kept.named("decode"), kept.named("queue")
    assert (decode.began, decode.ended, decode.error) == (2.0, 3.0, "cancelled")
    assert decode.events == (("first_token", 2.5), ("last_token", 3.0))
    assert (queue.began, queue.ended) == (2.0, 2.25)
    assert not tracer.active


def test_one_of_many_rows_is_found(tracer: WorkerTracer, kept: Kept) -> None:
    others = [(SequenceKey("router", slot, 1), 5, EndReason.NONE) for slot in range(5)]
    tracer.begin(KEY, Work.GENERATE, REQUEST, 1.0)
    tracer.started(KEY, 0, 1.5)
    tracer.rows(rows(*others, (KEY, 0, EndReason.NONE)), 1.5, 2.0)
    tracer.rows(rows(*others, (KEY, 1, EndReason.LENGTH)), 2.0, 3.0)
    assert [span.name for span in kept.spans] == ["prefill", "queue", "compute", "decode"]
    (decode,) = kept.named("decode")
    assert decode.attributes["gen_ai.usage.output_tokens"] == 2
    assert decode.attributes["gen_ai.response.finish_reasons"] == ("length",)


@pytest.mark.parametrize(
    ("cause", "errors"), [(None, [""]), (TransferCause.PEER_LOST, ["peer_lost"]), (TransferCause.ABANDONED, [])]
)
def test_transfers(tracer: WorkerTracer, kept: Kept, cause: TransferCause | None, errors: list[str]) -> None:
    tracer.begin(KEY, Work.PREFILL, REQUEST, 1.0)
    tracer.rows(rows((KEY, 0, EndReason.NONE)), 1.0, 2.0)
    assert not tracer.active  # nothing is looked for in steps any more
    tracer.sent(KEY, (1.5, 2.5), (3, 300), cause)
    assert [span.error for span in kept.named("kv_transfer")] == errors
    tracer.sent(KEY, (1.5, 2.5), (3, 300), cause)  # said once
    assert len(kept.named("kv_transfer")) == len(errors)
