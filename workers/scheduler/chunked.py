"""Fills one step: which sequence computes how many tokens, and the `StepPlan` arrays for the runner.

Method: Sarathi-Serve (OSDI 2024) section 4, chunked prefill with decodes riding along under a token budget: decodes
first, then prefills under way, then new ones. The scheduler calls it; it reads the table and changes nothing.
"""

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple

import numpy as np

from penstock.workers.scheduler.plan import I32, StepPlan
from penstock.workers.scheduler.row_layout import RowLayout
from penstock.workers.scheduler.scoring import NO_ROWS, NO_SPANS, Spans, plan_embeddings, plan_scores
from penstock.workers.scheduler.table import COMPUTED, LAST_TOKEN, PREFILL, SequenceTable, Slots

_NO_COPIES = np.zeros((0, 2), np.int32)


class StepBudget:
    """Tokens left in the step being planned, and the prefill chunks chosen so far."""

    def __init__(self, tokens: int, chunk_limit: int) -> None:
        self.left = tokens
        self._chunk_limit = chunk_limit or tokens
        self.slots: list[int] = []
        self.counts: list[int] = []
        self.finishing: list[bool] = []  # the chunk is its prefill's last: a token is sampled
        self.copies: list[tuple[int, int]] = []
        self.num_continued = 0  # of the chunks, those of prefills that were under way

    def add_chunk(self, slot: int, wanted: int) -> None:
        """Give the row as many of `wanted` tokens as the budget and the chunk limit allow."""
        count = min(wanted, self.left, self._chunk_limit)
        if count > 0:
            self.slots.append(slot)
            self.counts.append(count)
            self.finishing.append(count == wanted)
            self.left -= count


class OpenStep(NamedTuple):
    """A plan, with what its commit needs again in the form the table likes best."""

    plan: StepPlan
    slots: Slots  # [N]
    computed: I32  # [N] tokens with KV after the step
    sampled: Slots  # [S] slots of the rows that sample
    fields: I32  # [fields, S] of the table, of these rows
    removals: int  # the table's count when planned: unchanged means that every row is still there
    spans: Spans  # prompt tokens scored, in the plan's order


def continue_prefills(table: SequenceTable, budget: StepBudget) -> None:
    """Chunks for prefills under way, oldest request first."""
    slots = table.rows_in(PREFILL)
    if len(slots) > 1:
        slots = slots[np.argsort(table.arrival[slots])]
    for slot in slots.tolist():
        if not budget.left:
            return
        budget.add_chunk(slot, int(table.length[slot] - table.computed[slot]))
        budget.num_continued += 1


def assemble(table: SequenceTable, layout: RowLayout, step: int, decode: Slots, budget: StepBudget) -> OpenStep:
    """The plan for these decode rows and the budget's chunks. Decode rows all sample and compute one token."""
    slots = layout.order(decode)
    num_decode, num_rows = len(slots), len(slots) + len(budget.slots)
    offsets = np.arange(num_rows + 1, dtype=np.int32)
    sample_rows = offsets[:num_rows]
    borders: list[int] = []
    if budget.slots:
        slots = np.concatenate((slots, budget.slots))
        borders = list(accumulate(budget.counts, initial=num_decode))
        sample_rows = sample_rows.copy()
        offsets[num_decode:] = borders
    fields = table.fields.take(slots, axis=1)
    starts, token_ids = fields[COMPUTED], fields[LAST_TOKEN]
    ends = starts + 1
    if budget.slots:
        ends[num_decode:] += np.array(budget.counts, np.int32) - 1
        token_ids = np.concatenate((token_ids[:num_decode], *_chunks(table, budget, starts[num_decode:])))
    sampled, of_sampled = slots, fields
    if not all(budget.finishing):
        sample_rows = sample_rows[np.array([True] * num_decode + budget.finishing)]
        sampled, of_sampled = slots[sample_rows], fields[:, sample_rows]
    scored, spans, embed_rows = None, NO_SPANS, NO_ROWS
    if table.asking and budget.slots:
        scored, spans = plan_scores(table, budget.slots, starts[num_decode:].tolist(), borders)
        embed_rows = plan_embeddings(table, sampled[num_decode:].tolist(), num_decode)
    plan = StepPlan(
        step=step,
        slots=slots.astype(np.int32),
        starts=starts,
        offsets=offsets,
        token_ids=token_ids,
        block_tables=layout.lay_out(slots, -(-int(np.maximum.reduce(ends)) // table.block_size)),
        sample_rows=sample_rows,
        sampling=table.sampling(sampled, of_sampled),
        num_decode=num_decode,
        copies=np.array(budget.copies, np.int32) if budget.copies else _NO_COPIES,
        scored=scored,
        embed_rows=embed_rows,
        num_continued=num_decode + budget.num_continued,
    )
    return OpenStep(plan, slots, ends, sampled, of_sampled, table.removals, spans)


def _chunks(table: SequenceTable, budget: StepBudget, starts: I32) -> list[I32]:
    """Tokens that prefill rows feed to the model."""
    rows = zip(budget.slots, starts.tolist(), budget.counts, strict=True)
    return [table.tokens[slot, start : start + count] for slot, start, count in rows]
