"""From a step's columns to one frame per router and back: every row arrives once, at the right router, in order."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.workers.frames import frame_of_arrived, merge_frames, split_by_router
from penstock.workers.protocol import EndReason, TokenFrame
from penstock.workers.scheduler.events import EndedEvent, SequenceKey
from penstock.workers.scheduler.plan import SampledLogprobs
from penstock.workers.wire import decode_to_router, encode


@dataclass
class Columns:
    router_ids: tuple[str, ...]
    router_index: Any
    slots: Any
    attempts: Any
    starts: Any
    tokens: Any
    ends: Any
    logprobs: SampledLogprobs | None = None


def columns(routers: list[int], wanted: list[int | None] | None = None) -> Columns:
    rows = len(routers)
    logprobs = None
    if wanted is not None:
        widest = max((want or 0) for want in wanted)
        logprobs = SampledLogprobs(
            np.array([np.nan if want is None else -row - 1.0 for row, want in enumerate(wanted)], np.float32),
            np.array([want or 0 for want in wanted], np.int32),
            np.arange(rows * widest, dtype=np.int32).reshape(rows, widest),
            -np.arange(rows * widest, dtype=np.float32).reshape(rows, widest),
        )
    return Columns(
        tuple(f"r{index}" for index in range(5)),
        np.array(routers, np.int32),
        np.arange(rows, dtype=np.uint32),
        np.full(rows, 3, np.uint16),
        np.arange(rows, dtype=np.uint32) * 10,
        np.arange(rows, dtype=np.int32) + 500,
        np.zeros(rows, np.uint8),
        logprobs,
    )


def rows_of(frame: TokenFrame) -> list[tuple[Any, ...]]:
    """(slot, attempt, start, token, logprob, alternatives) per token."""
    out, at, top_at = [], 0, 0
    asked = len(frame.logprobs) > 0
    for row, count in enumerate(frame.counts.tolist()):
        for offset in range(count):
            top = int(frame.top_counts[at]) if asked else 0
            chosen = float(frame.logprobs[at]) if asked else float("nan")
            ids = tuple(frame.top_ids[top_at : top_at + top].tolist())
            start = int(frame.starts[row]) + offset
            out.append(
                (int(frame.slots[row]), int(frame.attempts[row]), start, int(frame.tokens[at]), repr(chosen), ids)
            )
            at, top_at = at + 1, top_at + top
    return out


rows = st.lists(st.tuples(st.integers(0, 4), st.none() | st.integers(0, 3)), max_size=30)


@settings(deadline=None, max_examples=100)
@given(rows, st.booleans())
def test_split_keeps_every_row(rows: list[tuple[int, int | None]], with_logprobs: bool) -> None:
    routers, wanted = [router for router, _ in rows], [want for _, want in rows]
    step = columns(routers, wanted if with_logprobs and rows else None)
    frames = split_by_router(9, step)
    assert [name for name, _ in frames] == [f"r{index}" for index in sorted(set(routers))]
    for name, frame in frames:
        assert frame.step == 9
        mine = [row for row, router in enumerate(routers) if f"r{router}" == name]
        decoded = decode_to_router(encode(frame))
        assert isinstance(decoded, TokenFrame)
        got = rows_of(decoded)
        assert [each[:4] for each in got] == [(row, 3, row * 10, row + 500) for row in mine]
        if with_logprobs:
            chosen = [float("nan") if wanted[row] is None else -row - 1.0 for row in mine]
            assert [each[4] for each in got] == [repr(value) for value in chosen]
            widest = max(want or 0 for want in wanted)
            tops = [tuple(range(row * widest, row * widest + (wanted[row] or 0))) for row in mine]
            assert [each[5] for each in got] == tops


@settings(deadline=None, max_examples=50)
@given(st.lists(rows.filter(bool), min_size=1, max_size=4))
def test_merging_is_concatenation(steps: list[list[tuple[int, int | None]]]) -> None:
    frames = []
    for number, rows in enumerate(steps):
        wanted = [want for _, want in rows] if number % 2 else None
        ((_, frame),) = split_by_router(number, columns([0] * len(rows), wanted))
        frames.append(frame)
    merged = decode_to_router(encode(merge_frames(frames)))
    assert isinstance(merged, TokenFrame)
    assert rows_of(merged) == [row for frame in frames for row in rows_of(frame)]
    assert merged.step == len(steps) - 1


def test_a_step_without_samples_makes_no_frame() -> None:
    assert split_by_router(1, columns([])) == []


def test_rows_of_nobody_who_asked_carry_no_logprobs() -> None:
    ((_, frame),) = split_by_router(1, columns([2, 2], [None, None]))
    assert len(frame.logprobs) == len(frame.top_counts) == 0


def test_frame_of_an_end_that_came_with_the_kv() -> None:
    frame = frame_of_arrived(4, EndedEvent(SequenceKey("r", 7, 2), 5, (10, 11), EndReason.STOP))
    assert [row[:4] for row in rows_of(frame)] == [(7, 2, 5, 10), (7, 2, 6, 11)]
    assert frame.ends.tolist() == [EndReason.STOP]


@pytest.mark.parametrize("rows", [1, 256])
def test_encoding_is_cheap(rows: int) -> None:
    import time

    step = columns([0] * rows)
    best = float("inf")
    for _ in range(50):
        began = time.perf_counter()
        for _, frame in split_by_router(1, step):
            encode(frame)
        best = min(best, time.perf_counter() - began)
    assert best < 50e-6
