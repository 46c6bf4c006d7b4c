"""What a step reads of the sequence table, in an order of rows kept from step to step, and what it writes there.

Part of the scheduler, which asks it when a plan is put together and when its result is there. A decoding sequence
keeps its row as long as no row before the last ones falls empty, so from one step to the next only few rows of the
tables change, and only those are copied: tables of hundreds of long contexts would else be the largest thing a step
touches. Knows no budgets. `native_rows.py` does the same with one call for each.

Invariant: row r of the laid-out tables is that of the sequence in `_slots[r]`, as it was at version `_versions[r]`.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from penstock.workers.scheduler.judgement import Ends, judge_tokens
from penstock.workers.scheduler.plan import I32, U64
from penstock.workers.scheduler.row_arena import offsets_of
from penstock.workers.scheduler.table import COMPUTED, DECODE, LAST_TOKEN, LENGTH, SequenceTable, Slots

_MORE_COLUMNS = 16  # laid out beyond those that are needed, so that growing contexts seldom widen the tables
_NO_SLOTS: Slots = np.zeros(0, np.intp)


class StepRows(NamedTuple):
    """N rows, first those that decode; they compute one token each."""

    slots: Slots  # [N]
    plan_slots: I32  # [N] the same
    fields: I32  # [fields, N] of the table
    seeds: U64  # [N]
    computed: I32  # [N] tokens with KV after the step
    offsets: I32  # [N + 1] into token_ids
    token_ids: I32  # what the rows feed to the model
    block_tables: I32  # [N, widest]; valid until the next step's rows are gathered
    address: int = 0  # of all this in memory, where C++ put it there


class TableSteps(Protocol):
    """The steps over one table. `sample_rows` [S]: indices of the rows that sample."""

    def ready(self) -> tuple[int, Slots]:
        """How many rows decode, and those of them whose blocks have no room for their token."""
        ...

    def gather(self, num_decode: int, chunk_slots: list[int], chunk_counts: list[int]) -> StepRows:
        """Rows of all `num_decode` sequences that decode, and of these prefill chunks."""
        ...

    def advance(self, rows: StepRows, sample_rows: I32) -> None:
        """Take in what a step does to its rows whatever it samples."""
        ...

    def take_tokens(self, rows: StepRows, sample_rows: I32, tokens: I32) -> tuple[I32, Ends]:
        """Store a step's tokens [S], and what they mean: see `judge_tokens`."""
        ...


class RowLayout:
    """The definition, in numpy. No row is taken at first."""

    def __init__(self, table: SequenceTable) -> None:
        self._table = table
        self._slots = _NO_SLOTS
        self._tables: I32 = np.zeros_like(table.block_tables)
        self._versions: NDArray[np.int64] = np.full(table.max_seqs, -1, np.int64)
        self._width = 0  # columns laid out

    def ready(self) -> tuple[int, Slots]:
        """See `TableSteps`."""
        decodes = self._table.state == DECODE
        full = (decodes & (self._table.computed == self._table.capacity)).nonzero()[0]
        return int(np.count_nonzero(decodes)), full

    def gather(self, num_decode: int, chunk_slots: list[int], chunk_counts: list[int]) -> StepRows:
        """See `TableSteps`."""
        table = self._table
        slots = self.order(table.rows_in(DECODE))
        if chunk_slots:
            slots = np.concatenate((slots, chunk_slots))
        counts = np.ones(len(slots), np.int32)
        counts[num_decode:] = chunk_counts
        fields = table.fields.take(slots, axis=1)
        computed = fields[COMPUTED] + counts
        starts = fields[COMPUTED, num_decode:].tolist()
        chunks = zip(chunk_slots, starts, computed[num_decode:].tolist(), strict=True)
        return StepRows(
            slots,
            slots.astype(np.int32),
            fields,
            table.seed[slots],
            computed,
            offsets_of(counts),
            np.concatenate(
                (fields[LAST_TOKEN, :num_decode], *(table.tokens[slot, start:end] for slot, start, end in chunks))
            ),
            self.lay_out(slots, -(-int(computed.max()) // table.block_size)),
        )

    def advance(self, rows: StepRows, sample_rows: I32) -> None:
        """See `TableSteps`."""
        self._table.computed[rows.slots] = rows.computed
        self._table.lengthen(rows.slots[sample_rows], rows.fields[:, sample_rows])

    def take_tokens(self, rows: StepRows, sample_rows: I32, tokens: I32) -> tuple[I32, Ends]:
        """See `TableSteps`."""
        slots, fields = rows.slots[sample_rows], rows.fields[:, sample_rows]
        self._table.store_tokens(slots, fields[LENGTH], tokens)
        return judge_tokens(self._table, slots, fields, tokens)

    def order(self, decode: Slots) -> Slots:
        """The decoding slots, given in any order, in that of their rows: where they stood last, as far as possible."""
        count, before = len(decode), self._slots
        wanted = np.zeros(self._table.max_seqs, np.bool_)
        wanted[decode] = True
        stays = wanted[before]
        if len(before) == count == np.count_nonzero(stays):
            return before
        wanted[before] = False
        newcomers = wanted.nonzero()[0]
        holes = (~stays[:count]).nonzero()[0]
        movers = np.concatenate((before[count:][stays[count:]], newcomers))
        slots: Slots = np.concatenate((before[:count], movers[len(holes) :]))
        slots[holes] = movers[: len(holes)]
        return slots

    def lay_out(self, slots: Slots, width: int) -> I32:
        """Block tables int32 [len(slots), width] of these slots; valid until the next call."""
        table, rows = self._table, len(slots)
        versions = table.version[slots]
        if width > self._width:
            self._width = min(width + _MORE_COLUMNS, self._tables.shape[1])
            self._versions[:] = -1
        changed = (versions != self._versions[:rows]).nonzero()[0]
        if len(changed):
            self._tables[changed, : self._width] = table.block_tables[slots[changed], : self._width]
            self._versions[changed] = versions[changed]
        self._slots = slots
        return self._tables[:rows, :width]
