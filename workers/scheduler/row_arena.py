"""Rows of different lengths side by side in one flat array, gathered for a whole batch without a loop over rows.

Used by the scheduler's part that keeps logit edits (`edits.py`) and by sampling, which cuts a batch into pieces. Plain
numpy; knows nothing of sequences.

Invariant: every row lies in one piece below `used`; what cleared rows leave behind is dropped when room runs out.
"""

from __future__ import annotations

from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

Value = TypeVar("Value", np.int32, np.float32)
Indices = NDArray[np.intp]

_FIRST_CAPACITY = 256


def gather_ranges(
    flat: NDArray[Value], starts: Indices, counts: NDArray[np.integer]
) -> tuple[NDArray[Value], NDArray[np.int32]]:
    """`flat[starts[r] : starts[r] + counts[r]]` of every row r, one after the other, and where each begins [R + 1]."""
    offsets = offsets_of(counts)
    total = int(offsets[-1])
    if not total:
        return flat[:0].copy(), offsets
    index = np.arange(total) + np.repeat(starts - offsets[:-1], counts)
    return flat[index], offsets


def offsets_of(counts: NDArray[np.integer]) -> NDArray[np.int32]:
    """Borders int32 [R + 1] of ranges of these lengths."""
    offsets = np.zeros(len(counts) + 1, np.int32)
    np.cumsum(counts, out=offsets[1:])
    return offsets


class RowArena(Generic[Value]):
    """`num_rows` rows of numbers of one type, all empty at first."""

    def __init__(self, num_rows: int, dtype: type[Value]) -> None:
        self._flat: NDArray[Value] = np.zeros(_FIRST_CAPACITY, dtype)
        self._used = 0
        self._starts: Indices = np.zeros(num_rows, np.intp)
        self._counts: Indices = np.zeros(num_rows, np.intp)

    def put(self, row: int, values: NDArray[Value]) -> None:
        """Replace what the row holds."""
        self._counts[row] = 0
        count = len(values)
        if self._used + count > len(self._flat):
            self._compact(count)
        self._starts[row], self._counts[row] = self._used, count
        self._flat[self._used : self._used + count] = values
        self._used += count

    def clear(self, row: int) -> None:
        """Empty the row."""
        self._counts[row] = 0

    def take(self, rows: Indices) -> tuple[NDArray[Value], NDArray[np.int32]]:
        """The values of these rows, one row after the other, and where each begins [len(rows) + 1]."""
        return gather_ranges(self._flat, self._starts[rows], self._counts[rows])

    def _compact(self, room: int) -> None:
        """Keep what is in use, with at least as much room again and `room` more."""
        rows = np.flatnonzero(self._counts)
        kept, offsets = self.take(rows)
        self._flat = np.zeros(max(_FIRST_CAPACITY, 2 * (len(kept) + room)), self._flat.dtype)
        self._flat[: len(kept)] = kept
        self._starts[rows] = offsets[:-1]
        self._used = len(kept)
