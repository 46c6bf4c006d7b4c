"""Which prompt tokens a step scores and which rows it embeds, and what the results mean for their sequences.

Part of the scheduler: `chunked.py` asks it when a step is put together, `Scheduler.commit` when its result is there.
Prompt token j is scored by the logits after token j - 1, so a chunk over positions [a, b) scores tokens a + 1 ... b;
the first token has nothing before it. Works on prefill rows only, so a loop over them costs admissions, not steps.

Invariant: a sequence's `scored` counts the leading prompt tokens that need no score any more. It grows with commits
only, and while it is short of the prompt the sequence's prefix is not taken from the cache.
"""

from __future__ import annotations

from collections import abc
from collections.abc import Container
from dataclasses import dataclass

import numpy as np

from penstock.workers.errors import IntegrityError
from penstock.workers.scheduler.events import EmbeddedPrompt, ScoredChunk
from penstock.workers.scheduler.plan import I32, SampledLogprobs, ScoredPrompt, StepPlan, StepResult
from penstock.workers.scheduler.sequence import Sequence
from penstock.workers.scheduler.table import SequenceTable, Slots


@dataclass(frozen=True, slots=True, eq=False)
class ScoredSpan:
    """`count` prompt tokens from `start` on, scored for the sequence in `slot` by the step under way."""

    slot: int
    start: int
    count: int


NO_ROWS: I32 = np.zeros(0, np.int32)
Spans = abc.Sequence[ScoredSpan]
NO_SPANS: Spans = ()


def plan_scores(
    table: SequenceTable, slots: list[int], starts: list[int], offsets: list[int]
) -> tuple[ScoredPrompt | None, Spans]:
    """What prefill rows score: row i computes tokens [starts[i], ...), which begin at `offsets[i]` of the step's."""
    spans: list[ScoredSpan] = []
    rows: list[I32] = []
    targets: list[I32] = []
    wanted: list[I32] = []
    for slot, start, begin, end in zip(slots, starts, offsets, offsets[1:], strict=False):
        sequence = table.sequence_in(slot)
        if sequence.unscored == 0:
            continue
        first = max(start + 1, sequence.scored)
        last = min(start + end - begin + 1, sequence.prompt_length)
        if last <= first:
            continue
        spans.append(ScoredSpan(slot, first, last - first))
        rows.append(np.arange(begin + first - 1 - start, begin + last - 1 - start, dtype=np.int32))
        targets.append(table.tokens[slot, first:last])
        wanted.append(np.full(last - first, sequence.request.sampling.prompt_logprobs or 0, np.int32))
    if not spans:
        return None, NO_SPANS
    return ScoredPrompt(np.concatenate(rows), np.concatenate(targets), np.concatenate(wanted)), spans


def plan_embeddings(table: SequenceTable, sampled: list[int], first_row: int) -> I32:
    """Indices among the sampled rows of prompts that are to be embedded; prefill rows are `first_row` and on."""
    rows = [
        row
        for row, slot in enumerate(sampled, start=first_row)
        if _embeds(table.sequence_in(slot), int(table.length[slot]))
    ]
    return np.array(rows, np.int32) if rows else NO_ROWS


def take_scores(table: SequenceTable, spans: Spans, result: StepResult, over: Container[int] = ()) -> list[ScoredChunk]:
    """A step's scores but for the slots whose sequence is `over`. Raises IntegrityError if they do not fit the plan."""
    scores, count = result.scored, sum(span.count for span in spans)
    if scores is None or len(scores.chosen) != count:
        raise IntegrityError("the step did not score the prompt tokens that it was to score")
    chunks: list[ScoredChunk] = []
    begin = 0
    for span in spans:
        part = slice(begin, begin + span.count)
        begin += span.count
        if span.slot in over:
            continue
        sequence = table.sequence_in(span.slot)
        sequence.scored = span.start + span.count
        columns = SampledLogprobs(
            scores.chosen[part], scores.top_counts[part], scores.top_ids[part], scores.top_logprobs[part]
        )
        chunks.append(ScoredChunk(sequence.key, span.start, columns))
    return chunks


def take_embeddings(
    table: SequenceTable, slots: Slots, plan: StepPlan, result: StepResult, over: Container[int] = ()
) -> list[EmbeddedPrompt]:
    """A step's embeddings but for slots that are `over`; `slots` [S] are those of its sampled rows.

    Raises IntegrityError if some are missing.
    """
    if result.embeddings is None or len(result.embeddings) != len(plan.embed_rows):
        raise IntegrityError("the step did not embed the prompts that it was to embed")
    found = []
    for row, values in zip(plan.embed_rows.tolist(), result.embeddings, strict=True):
        if slots[row] not in over:
            found.append(EmbeddedPrompt(table.sequence_in(int(slots[row])).key, values))
    return found


def _embeds(sequence: Sequence, length: int) -> bool:
    """Only the prompt itself is embedded, nothing that was generated after it."""
    return sequence.request.embed and length == sequence.prompt_length
