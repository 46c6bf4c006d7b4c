"""What is left of a step and its result without those who left while it ran. Whole columns at a time.

Called by `Scheduler.commit`, which then deals with the rows that ended. Knows no blocks and no queue.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from penstock.workers.errors import IntegrityError
from penstock.workers.scheduler.events import StepOutcome
from penstock.workers.scheduler.judgement import Ends
from penstock.workers.scheduler.open_steps import OpenStep
from penstock.workers.scheduler.plan import I32, SampledLogprobs, StepResult
from penstock.workers.scheduler.table import ATTEMPT, ROUTER_INDEX, ROUTER_SLOT, Slots


class CommittedRows(NamedTuple):
    """A step and its result without the rows whose sequence was over before the result was known."""

    slots: Slots  # [N] computed rows
    computed: I32  # [N] tokens with KV in each
    num_decode: int
    sampled: Slots  # [S] slots of the rows with a new token
    fields: I32  # [fields, S] of the table, of these rows, before the step
    tokens: I32  # [S]
    logprobs: SampledLogprobs | None
    kept: NDArray[np.bool_] | None = None  # of the step's sampled rows; None: all

    def outcome(self, router_ids: tuple[str, ...], starts: I32, ends: Ends, **more: Any) -> StepOutcome:
        """What the step brought each router, with `more` fields of a `StepOutcome`."""
        return StepOutcome(
            router_ids=router_ids,
            router_index=self.fields[ROUTER_INDEX],
            slots=self.fields[ROUTER_SLOT].view(np.uint32),
            attempts=self.fields[ATTEMPT].astype(np.uint16),
            starts=starts.view(np.uint32),
            tokens=self.tokens,
            ends=ends,
            logprobs=self.logprobs,
            **more,
        )


def committed_rows(step: OpenStep, result: StepResult, leaving: Collection[int]) -> CommittedRows:
    """Without the `leaving` slots. Raises IntegrityError where the result does not belong to the step's plan."""
    tokens, logprobs = result.token_ids, result.logprobs
    if len(tokens) != len(step.sampled):
        raise IntegrityError(f"{len(tokens)} tokens sampled for {len(step.sampled)} rows")
    slots, computed, num_decode = step.rows.slots, step.rows.computed, step.plan.num_decode
    if not leaving:
        return CommittedRows(slots, computed, num_decode, step.sampled, step.fields, tokens, logprobs)
    gone = list(leaving)
    alive = np.isin(slots, gone, invert=True)
    kept = np.isin(step.sampled, gone, invert=True)
    return CommittedRows(
        slots=slots[alive],
        computed=computed[alive],
        num_decode=int(np.count_nonzero(alive[:num_decode])),
        sampled=step.sampled[kept],
        fields=step.fields[:, kept],
        tokens=tokens[kept],
        logprobs=None if logprobs is None else _select(logprobs, kept),
        kept=kept,
    )


def _select(logprobs: SampledLogprobs, kept: NDArray[np.bool_]) -> SampledLogprobs:
    return SampledLogprobs(
        chosen=logprobs.chosen[kept],
        top_counts=logprobs.top_counts[kept],
        top_ids=logprobs.top_ids[kept],
        top_logprobs=logprobs.top_logprobs[kept],
    )
