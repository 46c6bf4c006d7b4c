"""`RowLayout` with one call of C++ for each of its own: numpy needs dozens of small ones for a step.

Part of the scheduler, whose roster asks `steps_over` once for its table. `row_layout.py` is the definition.

Invariant: the addresses kept here are of arrays that the table, or this object, holds as long as it lives.
"""

from __future__ import annotations

import ctypes
from array import array
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penstock.workers.errors import IntegrityError
from penstock.workers.native.library import load
from penstock.workers.scheduler.judgement import Ends
from penstock.workers.scheduler.plan import I32
from penstock.workers.scheduler.row_layout import RowLayout, StepRows, TableSteps
from penstock.workers.scheduler.table import SequenceTable, Slots


class _Table(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("state", "fields", "seed", "tokens", "block_tables", "version")),
        *((name, ctypes.c_void_p) for name in ("capacity", "min_tokens")),
        *((name, ctypes.c_int64) for name in ("max_seqs", "num_fields", "max_length", "table_width", "block_size")),
    )


class _Layout(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("slots", "tables", "versions", "wanted", "movers")),
        ("num_rows", ctypes.c_int64),
        ("width", ctypes.c_int64),
    )


def steps_over(table: SequenceTable) -> TableSteps:
    """The fastest there is on this machine."""
    library = load()
    return RowLayout(table) if library is None else NativeRows(table, library)


class NativeRows:
    """See `RowLayout`."""

    def __init__(self, table: SequenceTable, library: ctypes.PyDLL) -> None:
        max_seqs = table.max_seqs
        self._library = library
        self._columns = table
        self._num_fields = len(table.fields)
        self._tables = np.zeros_like(table.block_tables)
        columns: tuple[NDArray[Any], ...] = (table.state, table.fields, table.seed, table.tokens, table.block_tables)
        columns += (table.version, table.capacity, table.edits.min_tokens)
        kept = (
            np.zeros(max_seqs, np.int64),
            self._tables,
            np.full(max_seqs, -1, np.int64),
            np.zeros(max_seqs, np.uint8),
            np.zeros(max_seqs, np.intp),
        )
        self._full = kept[-1]  # scratch of C++, which leaves there who has no room
        self._arrays = (*columns, *kept)
        sizes = (max_seqs, self._num_fields, table.tokens.shape[1], table.block_tables.shape[1], table.block_size)
        self._table = _Table(*(column.ctypes.data for column in columns), *sizes)
        self._layout = _Layout(*(part.ctypes.data for part in kept), 0, 0)
        self._addresses = (ctypes.addressof(self._table), ctypes.addressof(self._layout))
        self._full_address = self._full.ctypes.data
        self._tokens = np.zeros(max_seqs, np.int32)  # scratch, at a known address
        self._tokens_address = self._tokens.ctypes.data
        self._stops = table.stop_ids
        self._stops_address = self._stops.ctypes.data

    def ready(self) -> tuple[int, Slots]:
        """See `TableSteps`."""
        counts = self._library.penstock_ready_rows(self._addresses[0], self._full_address)
        return counts & 0xFFFFFFFF, self._full[: counts >> 32].copy()

    def gather(self, num_decode: int, chunk_slots: list[int], chunk_counts: list[int]) -> StepRows:
        """See `TableSteps`. Raises IntegrityError unless so many rows decode."""
        rows, fields = num_decode + len(chunk_slots), self._num_fields
        ends = 3 * rows + 1  # of what comes before the fields
        num_ints = ends + fields * rows + num_decode + sum(chunk_counts)
        longs = np.empty(2 * rows + (num_ints + 1) // 2, np.int64)
        ints = longs[2 * rows :].view(np.int32)[:num_ints]
        chunks = array("q", chunk_slots + chunk_counts)
        address = _address(longs)
        width = self._library.penstock_gather_rows(
            *self._addresses,
            address,
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
            address,
        )

    def advance(self, rows: StepRows, sample_rows: I32) -> None:
        """See `TableSteps`."""
        self._library.penstock_advance_rows(
            self._addresses[0], rows.address, len(rows.slots), _indices(rows, sample_rows), len(sample_rows)
        )

    def take_tokens(self, rows: StepRows, sample_rows: I32, tokens: I32) -> tuple[I32, Ends]:
        """See `TableSteps`."""
        if self._stops is not self._columns.stop_ids:
            self._stops = self._columns.stop_ids
            self._stops_address = self._stops.ctypes.data
        count = len(sample_rows)
        self._tokens[:count] = tokens
        starts = np.empty(count + count // 4 + 1, np.int32)  # and the ends, of one byte each
        address = _address(starts)
        self._library.penstock_take_tokens(
            self._addresses[0],
            rows.address,
            len(rows.slots),
            _indices(rows, sample_rows),
            count,
            self._tokens_address,
            self._stops_address,
            len(self._stops),
            address,
            address + 4 * count,
        )
        return starts[:count], starts[count:].view(np.uint8)[:count]


def _indices(rows: StepRows, sample_rows: I32) -> int | None:
    """Where the indices lie; None where all rows sample."""
    return None if len(sample_rows) == len(rows.slots) else sample_rows.ctypes.data


def _address(values: NDArray[Any]) -> int:
    """Where an array lies that holds something; several times as fast as `values.ctypes.data`."""
    return ctypes.addressof(ctypes.c_char.from_buffer(values.data))
