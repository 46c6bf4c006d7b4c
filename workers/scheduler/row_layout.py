"""In which order sequences stand in a step's plan, kept from step to step, and their block tables in that order.

Part of the scheduler: `chunked.py` asks it when a plan is put together. A decoding sequence keeps its row as long as no
row before the last ones falls empty, so from one step to the next only few rows of the tables change, and only those
are copied: tables of hundreds of long contexts would else be the largest thing a step touches. Knows no budgets.

Invariant: row r of the laid-out tables is that of the sequence in `_slots[r]`, as it was at version `_versions[r]`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from penstock.workers.scheduler.plan import I32
from penstock.workers.scheduler.table import SequenceTable, Slots

_MORE_COLUMNS = 16  # laid out beyond those that are needed, so that growing contexts seldom widen the tables
_NO_SLOTS: Slots = np.zeros(0, np.intp)


class RowLayout:
    """The rows of one table's plans; no row is taken at first."""

    def __init__(self, table: SequenceTable) -> None:
        self._table = table
        self._slots = _NO_SLOTS
        self._tables: I32 = np.zeros_like(table.block_tables)
        self._versions: NDArray[np.int64] = np.full(table.max_seqs, -1, np.int64)
        self._width = 0  # columns laid out

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
