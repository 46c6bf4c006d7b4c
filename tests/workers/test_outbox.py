"""What waits for a slow router: order, merging, bounds, one wake-up per batch."""

import numpy as np

from penstock.workers.outbox import Outbox
from penstock.workers.protocol import (
    Embedding,
    Failed,
    FailureCode,
    KVEvents,
    Load,
    PromptLogprobs,
    Started,
    TokenFrame,
    ToRouter,
)
from penstock.workers.wire import decode_to_router


def frame(step: int, rows: int = 2) -> TokenFrame:
    slots = np.arange(rows, dtype=np.uint32)
    return TokenFrame(
        step,
        slots,
        np.ones(rows, np.uint16),
        np.full(rows, step, np.uint32),
        np.ones(rows, np.uint16),
        np.zeros(rows, np.uint8),
        np.full(rows, 100 + step, np.int32),
    )


def load(step: int) -> Load:
    return Load(step, 0.0, 0.1, 1, 2, 3, 4, 5, 6, 7, 8, False)


def taken(outbox: Outbox) -> list[ToRouter]:
    return [decode_to_router(data) for data in outbox.take()]


def test_order_is_kept_frames_merge_and_only_the_newest_load_leaves() -> None:
    outbox = Outbox(lambda: None)
    started, failed = Started(1, 1, 0), Failed(1, 1, FailureCode.INTERNAL, "x")
    for message in (started, load(1), frame(1), load(2), frame(2), frame(3), failed, frame(4), load(3)):
        outbox.push(message)
    first, merged, end, last, beat = taken(outbox)
    assert (first, end, beat) == (started, failed, load(3))
    assert isinstance(merged, TokenFrame)
    assert isinstance(last, TokenFrame)
    assert merged.step == 3
    assert merged.starts.tolist() == [1, 1, 2, 2, 3, 3]
    assert merged.tokens.tolist() == [101, 101, 102, 102, 103, 103]
    assert last.tokens.tolist() == [104, 104]
    assert taken(outbox) == []


def test_merged_frames_stay_small_enough_to_send() -> None:
    outbox = Outbox(lambda: None)
    for step in range(5):
        outbox.push(frame(step, 30_000))
    frames = taken(outbox)
    assert [len(part.slots) for part in frames if isinstance(part, TokenFrame)] == [60_000, 60_000, 30_000]


def test_one_wake_up_until_taken() -> None:
    calls: list[int] = []
    outbox = Outbox(lambda: calls.append(1))
    outbox.push(frame(1))
    outbox.push(frame(2))
    assert len(calls) == 1
    outbox.take()
    outbox.push(frame(3))
    assert len(calls) == 2


def test_a_reader_too_far_behind_is_cut_off() -> None:
    calls: list[int] = []
    outbox = Outbox(lambda: calls.append(1), max_bytes=5000)
    for step in range(3):
        outbox.push(frame(step, 50))
    assert not outbox.closed
    outbox.push(KVEvents(1, bytes(4000), b""))
    assert outbox.closed
    assert outbox.overflowed
    outbox.push(frame(9))
    assert outbox.take() == []
    assert calls


def test_close_drops_what_waits_and_wakes_the_writer() -> None:
    calls: list[int] = []
    outbox = Outbox(lambda: calls.append(1))
    outbox.push(frame(1))
    outbox.take()
    outbox.close()
    assert len(calls) == 2
    outbox.push(frame(2))
    assert outbox.take() == []
    assert not outbox.overflowed


def scores(start: int, count: int = 3) -> PromptLogprobs:
    column = np.full(count, -1.0, np.float32)
    none = np.zeros(0, np.int32)
    return PromptLogprobs(1, 1, start, column, np.zeros(count, np.uint8), none, np.zeros(0, np.float32))


def test_no_frame_passes_what_is_said_of_a_prompt() -> None:
    outbox = Outbox(lambda: None)
    embedding = Embedding(1, 1, np.ones(4, np.float32))
    for message in (frame(1), scores(1), load(1), frame(2), scores(4), embedding, load(2), frame(3), frame(4)):
        outbox.push(message)
    kinds = [type(message) for message in taken(outbox)]
    assert kinds == [TokenFrame, PromptLogprobs, TokenFrame, PromptLogprobs, Embedding, Load, TokenFrame]


def test_scores_and_embeddings_count_towards_the_bound() -> None:
    for message in (scores(1, 1000), Embedding(1, 1, np.ones(1000, np.float32))):
        outbox = Outbox(lambda: None, 4000)
        outbox.push(message)
        assert outbox.overflowed
