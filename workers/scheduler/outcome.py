"""Takes a step's sampled tokens into the table and says what they mean for the routers. Whole columns at a time.

Called by `Scheduler.commit`, which then deals with the rows that ended. Knows no blocks and no queue.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from penstock.workers.errors import IntegrityError
from penstock.workers.protocol import EndReason
from penstock.workers.scheduler.open_steps import OpenStep
from penstock.workers.scheduler.plan import I32, SampledLogprobs, StepResult
from penstock.workers.scheduler.table import (
    LAST_POSITION,
    LENGTH,
    PROMPT_LENGTH,
    SequenceTable,
    Slots,
)

STOP, LENGTH_END = np.uint8(EndReason.STOP), np.uint8(EndReason.LENGTH)


class CommittedRows(NamedTuple):
    """A step and its result without the rows whose sequence was over before the result was known."""

    slots: Slots  # [N] computed rows
    computed: I32  # [N] tokens with KV in each
    num_decode: int
    sampled: Slots  # [S] slots of the rows with a new token
    fields: I32  # [fields, S] of the table, of these rows, before the step
    tokens: I32  # [S]
    logprobs: SampledLogprobs | None


def committed_rows(step: OpenStep, result: StepResult, leaving: Collection[int]) -> CommittedRows:
    """Without the `leaving` slots. Raises IntegrityError where the result does not belong to the step's plan."""
    tokens, logprobs = result.token_ids, result.logprobs
    if len(tokens) != len(step.sampled):
        raise IntegrityError(f"{len(tokens)} tokens sampled for {len(step.sampled)} rows")
    num_decode = step.plan.num_decode
    if not leaving:
        return CommittedRows(step.slots, step.computed, num_decode, step.sampled, step.fields, tokens, logprobs)
    gone = list(leaving)
    alive = np.isin(step.slots, gone, invert=True)
    kept = np.isin(step.sampled, gone, invert=True)
    return CommittedRows(
        slots=step.slots[alive],
        computed=step.computed[alive],
        num_decode=int(np.count_nonzero(alive[:num_decode])),
        sampled=step.sampled[kept],
        fields=step.fields[:, kept],
        tokens=tokens[kept],
        logprobs=None if logprobs is None else _select(logprobs, kept),
    )


def judge_tokens(table: SequenceTable, slots: Slots, fields: I32, tokens: I32) -> tuple[I32, NDArray[np.uint8]]:
    """What one sampled token means for each row; `fields` are the table's of these rows, before it came.

    A stop token ends its choice unless more were to come before one may (`min_tokens`). Returns (index of the token
    among the generated ones, int32 [S]; EndReason, uint8 [S]).
    """
    positions = fields[LENGTH]
    starts: I32 = positions - fields[PROMPT_LENGTH]
    ends = (positions >= fields[LAST_POSITION]).view(np.uint8) * LENGTH_END
    stop_ids = table.stop_ids.take(slots, axis=1)
    stopped = np.logical_or.reduce(stop_ids == tokens, axis=0) if len(stop_ids) > 1 else stop_ids[0] == tokens
    if table.edits.active:
        stopped &= starts >= table.edits.min_tokens[slots]
    ends[stopped] = STOP
    return starts, ends


def _select(logprobs: SampledLogprobs, kept: NDArray[np.bool_]) -> SampledLogprobs:
    return SampledLogprobs(
        chosen=logprobs.chosen[kept],
        top_counts=logprobs.top_counts[kept],
        top_ids=logprobs.top_ids[kept],
        top_logprobs=logprobs.top_logprobs[kept],
    )
