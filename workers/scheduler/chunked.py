"""Fills one step: which sequence computes how many tokens, and the `StepPlan` arrays for the runner.

Method: Sarathi-Serve (OSDI 2024) section 4, chunked prefill with decodes riding along under a token budget: decodes
first, then prefills under way, then new ones. The scheduler calls it; it reads the table and changes nothing.
"""

from __future__ import annotations

import numpy as np

from penstock.workers.scheduler.open_steps import OpenStep
from penstock.workers.scheduler.plan import I32, StepPlan
from penstock.workers.scheduler.row_layout import TableSteps
from penstock.workers.scheduler.scoring import NO_ROWS, NO_SPANS, plan_embeddings, plan_scores
from penstock.workers.scheduler.table import COMPUTED, PREFILL, SequenceTable, Slots

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


def continue_prefills(table: SequenceTable, budget: StepBudget) -> None:
    """Chunks for prefills under way, oldest request first."""
    if PREFILL not in table.state.tobytes():  # seen several times as fast as by numpy
        return
    slots = table.rows_in(PREFILL).tolist()
    slots.sort(key=lambda slot: table.sequence_in(slot).arrival)
    for slot in slots:
        if not budget.left:
            return
        budget.add_chunk(slot, int(table.length[slot] - table.computed[slot]))
        budget.num_continued += 1


def assemble(
    table: SequenceTable,
    steps: TableSteps,
    step: int,
    num_decode: int,
    budget: StepBudget,
    before: OpenStep | None = None,
) -> OpenStep:
    """The plan for all rows that decode and the budget's chunks. Decode rows all sample and compute one token.

    `before`: the step under way, whose tokens are not known yet; the plan names them by where they are sampled.
    """
    rows = steps.gather(num_decode, budget.slots, budget.counts)
    if before is not None:
        _name_unknown(table, rows.token_ids[:num_decode], rows.slots[:num_decode], before.sampled)
    starts = rows.fields[COMPUTED]
    sample_rows = np.arange(len(starts), dtype=np.int32)
    sampled, of_sampled, seeds = rows.slots, rows.fields, rows.seeds
    if not all(budget.finishing):
        sample_rows = sample_rows[np.array([True] * num_decode + budget.finishing)]
        sampled, of_sampled, seeds = sampled[sample_rows], of_sampled[:, sample_rows], seeds[sample_rows]
    scored, spans, embed_rows = None, NO_SPANS, NO_ROWS
    if table.asking and budget.slots:
        borders = rows.offsets[num_decode:].tolist()
        scored, spans = plan_scores(table, budget.slots, starts[num_decode:].tolist(), borders)
        embed_rows = plan_embeddings(table, sampled[num_decode:].tolist(), num_decode)
    plan = StepPlan(
        step=step,
        slots=rows.plan_slots,
        starts=starts,
        offsets=rows.offsets,
        token_ids=rows.token_ids,
        block_tables=rows.block_tables,
        sample_rows=sample_rows,
        sampling=table.sampling(sampled, of_sampled, seeds),
        num_decode=num_decode,
        copies=np.array(budget.copies, np.int32) if budget.copies else _NO_COPIES,
        scored=scored,
        embed_rows=embed_rows,
        num_continued=num_decode + budget.num_continued,
        follows=before is not None,
        adapters=table.adapters.of(rows.slots),
    )
    return OpenStep(plan, rows, sampled, of_sampled, spans)


def _name_unknown(table: SequenceTable, token_ids: I32, slots: Slots, sampled: Slots) -> None:
    """Put -1 - i for the token of each row that is sampled as the i-th of the step under way."""
    names = np.zeros(table.max_seqs, np.int32)
    names[sampled] = np.arange(-1, -1 - len(sampled), -1, dtype=np.int32)
    named = names[slots]
    np.copyto(token_ids, named, where=named < 0)
