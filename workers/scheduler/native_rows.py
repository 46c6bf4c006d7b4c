"""`RowLayout` in one call of C++: numpy needs dozens of small ones for the rows of a step.

Part of the scheduler, which asks `gatherer_for` once for its table. `row_layout.py` is the definition.

Invariant: the addresses kept here are of arrays that the table, or this object, holds as long as it lives.
"""

from __future__ import annotations

import ctypes
from array import array

import numpy as np

from penstock.workers.errors import IntegrityError
from penstock.workers.native.library import load
from penstock.workers.scheduler.row_layout import RowGatherer, RowLayout, StepRows
from penstock.workers.scheduler.table import SequenceTable


class _Table(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("state", "fields", "seed", "tokens", "block_tables", "version")),
        *((name, ctypes.c_int64) for name in ("max_seqs", "num_fields", "max_length", "table_width", "block_size")),
    )


class _Layout(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("slots", "tables", "versions", "wanted", "movers")),
        ("num_rows", ctypes.c_int64),
        ("width", ctypes.c_int64),
    )


def gatherer_for(table: SequenceTable) -> RowGatherer:
    """The fastest one there is on this machine."""
    library = load()
    return RowLayout(table) if library is None else NativeRows(table, library)


class NativeRows:
    """See `RowLayout`."""

    def __init__(self, table: SequenceTable, library: ctypes.PyDLL) -> None:
        max_seqs = table.max_seqs
        self._gather = library.penstock_gather_rows
        self._num_fields = len(table.fields)
        self._tables = np.zeros_like(table.block_tables)
        columns = (table.state, table.fields, table.seed, table.tokens, table.block_tables, table.version)
        kept = (
            np.zeros(max_seqs, np.int64),
            self._tables,
            np.full(max_seqs, -1, np.int64),
            np.zeros(max_seqs, np.uint8),
            np.zeros(max_seqs, np.int64),
        )
        self._arrays = (*columns, *kept)
        sizes = (max_seqs, self._num_fields, table.tokens.shape[1], table.block_tables.shape[1], table.block_size)
        self._table = _Table(*(column.ctypes.data for column in columns), *sizes)
        self._layout = _Layout(*(part.ctypes.data for part in kept), 0, 0)
        self._addresses = (ctypes.addressof(self._table), ctypes.addressof(self._layout))

    def gather(self, num_decode: int, chunk_slots: list[int], chunk_counts: list[int]) -> StepRows:
        """See `RowGatherer`. Raises IntegrityError unless so many rows decode."""
        rows, fields = num_decode + len(chunk_slots), self._num_fields
        ends = 3 * rows + 1  # of what comes before the fields
        num_ints = ends + fields * rows + num_decode + sum(chunk_counts)
        longs = np.empty(2 * rows + (num_ints + 1) // 2, np.int64)
        ints = longs[2 * rows :].view(np.int32)[:num_ints]
        chunks = array("q", chunk_slots + chunk_counts)
        width = self._gather(
            *self._addresses,
            # Several times as fast as `longs.ctypes.data`.
            ctypes.addressof(ctypes.c_char.from_buffer(longs.data)),
            num_decode,
            chunks.buffer_info()[0],
            len(chunk_slots),
        )
        if width < 0:
            raise IntegrityError(f"{num_decode} rows are planned to decode, others do")
        return StepRows(
            longs[:rows],
            ints[:rows],
            ints[ends : ends + fields * rows].reshape(fields, rows),
            longs[rows : 2 * rows].view(np.uint64),
            ints[rows : 2 * rows],
            ints[2 * rows : ends],
            ints[ends + fields * rows :],
            self._tables[:rows, :width],
        )
