"""Token frames: from a step's columns to one frame per router, and several frames back into one.

`engine.py` splits a step's outcome over the routers; `outbox.py` merges frames that wait for a slow reader. Pure
functions over numpy columns; no per-token Python on the way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from penstock.workers.protocol import PromptLogprobs, TokenFrame
from penstock.workers.scheduler.events import EndedEvent, ScoredChunk, TakenOverEvent
from penstock.workers.scheduler.plan import SampledLogprobs

_LogprobColumns = tuple[NDArray[np.float32], NDArray[np.uint8], NDArray[np.int32], NDArray[np.float32]]
_NO_LOGPROBS: _LogprobColumns = (
    np.zeros(0, np.float32),
    np.zeros(0, np.uint8),
    np.zeros(0, np.int32),
    np.zeros(0, np.float32),
)
_ONES = np.ones(1 << 12, np.uint16)  # of a frame with one token per row


class StepColumns(Protocol):
    """What one step sampled, as columns over S rows (the scheduler's `StepOutcome` is one)."""

    @property
    def router_ids(self) -> tuple[str, ...]: ...  # what `router_index` points into
    @property
    def router_index(self) -> NDArray[np.int32]: ...
    @property
    def slots(self) -> NDArray[np.uint32]: ...
    @property
    def attempts(self) -> NDArray[np.uint16]: ...
    @property
    def starts(self) -> NDArray[np.uint32]: ...
    @property
    def tokens(self) -> NDArray[np.int32]: ...
    @property
    def ends(self) -> NDArray[np.uint8]: ...
    @property
    def logprobs(self) -> SampledLogprobs | None: ...


def split_by_router(step: int, columns: StepColumns) -> list[tuple[str, TokenFrame]]:
    """One frame per router that has rows in this step, one token per row."""
    rows = len(columns.tokens)
    if rows == 0:
        return []
    index = columns.router_index
    first = int(index[0])
    if len(columns.router_ids) == 1 or bool((index == first).all()):
        return [(columns.router_ids[first], _frame(step, columns, None))]
    order = np.argsort(index, kind="stable")
    borders = np.flatnonzero(np.diff(index[order])) + 1
    return [
        (columns.router_ids[int(index[rows_of[0]])], _frame(step, columns, rows_of))
        for rows_of in np.split(order, borders)
    ]


def _frame(step: int, columns: StepColumns, rows: NDArray[np.intp] | None) -> TokenFrame:
    """The frame of the given rows; `None` = of all."""
    pick = slice(None) if rows is None else rows
    slots = columns.slots[pick]
    logprobs = _logprob_columns(columns.logprobs, pick)
    return TokenFrame(
        step,
        slots,
        columns.attempts[pick],
        columns.starts[pick],
        _ONES[: len(slots)] if len(slots) <= len(_ONES) else np.ones(len(slots), np.uint16),
        columns.ends[pick],
        columns.tokens[pick],
        *logprobs,
    )


def _logprob_columns(sampled: SampledLogprobs | None, pick: slice | NDArray[np.intp]) -> _LogprobColumns:
    """`logprobs`, `top_counts`, `top_ids`, `top_logprobs` of the rows; nothing when none of them asked."""
    if sampled is None:
        return _NO_LOGPROBS
    chosen = sampled.chosen[pick]
    if bool(np.isnan(chosen).all()):
        return _NO_LOGPROBS
    return _flat(chosen, sampled.top_counts[pick], sampled.top_ids[pick], sampled.top_logprobs[pick])


def _flat(
    chosen: NDArray[np.float32], counts: NDArray[np.int32], ids: NDArray[np.int32], logprobs: NDArray[np.float32]
) -> _LogprobColumns:
    """The columns of a message, from one row per token with `counts` used alternatives."""
    wanted = np.arange(ids.shape[1]) < counts[:, None]
    return (
        np.ascontiguousarray(chosen, np.float32),
        counts.astype(np.uint8),
        ids[wanted].astype(np.int32, copy=False),
        logprobs[wanted].astype(np.float32, copy=False),
    )


def prompt_logprobs_of(chunk: ScoredChunk) -> PromptLogprobs:
    """The message with a chunk's prompt logprobs."""
    scores = chunk.scores
    columns = _flat(scores.chosen, scores.top_counts, scores.top_ids, scores.top_logprobs)
    return PromptLogprobs(chunk.key.slot, chunk.key.attempt, chunk.start, *columns)


def frame_of_arrived(step: int, event: EndedEvent | TakenOverEvent) -> TokenFrame:
    """The one row of a choice whose tokens came from a peer, and ended it, or from the worker that had it before."""
    return TokenFrame(
        step,
        np.array([event.key.slot], np.uint32),
        np.array([event.key.attempt], np.uint16),
        np.array([event.start], np.uint32),
        np.array([len(event.tokens)], np.uint16),
        np.array([event.end], np.uint8),
        np.array(event.tokens, np.int32),
    )


def merge_frames(frames: Sequence[TokenFrame]) -> TokenFrame:
    """One frame with the rows of all, in order; a row's index makes it applicable wherever it stands."""
    if len(frames) == 1:
        return frames[0]
    with_logprobs = any(len(frame.logprobs) for frame in frames)
    return TokenFrame(
        frames[-1].step,
        np.concatenate([frame.slots for frame in frames]),
        np.concatenate([frame.attempts for frame in frames]),
        np.concatenate([frame.starts for frame in frames]),
        np.concatenate([frame.counts for frame in frames]),
        np.concatenate([frame.ends for frame in frames]),
        np.concatenate([frame.tokens for frame in frames]),
        *(_merged_logprobs(frames) if with_logprobs else _NO_LOGPROBS),
    )


def _merged_logprobs(frames: Sequence[TokenFrame]) -> _LogprobColumns:
    chosen = [
        frame.logprobs if len(frame.logprobs) else np.full(len(frame.tokens), np.nan, np.float32) for frame in frames
    ]
    counts = [frame.top_counts if len(frame.top_counts) else np.zeros(len(frame.tokens), np.uint8) for frame in frames]
    return (
        np.concatenate(chosen),
        np.concatenate(counts),
        np.concatenate([frame.top_ids for frame in frames]),
        np.concatenate([frame.top_logprobs for frame in frames]),
    )
