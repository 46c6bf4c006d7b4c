"""A ragged batch as sliding-window attention sees it: rows cut short at the first block that a window reaches.

Called by `kernels/cpu/attention.py` when it plans a step for layers with a window. Positions count from the first block
that is kept, which changes no distance between a query and a key, so everything after works as without a window.
Long rows are cut into pieces, each with a first block of its own. Pure numpy; knows only lengths and block numbers.
Legend: N rows, M pieces, P slots of a block.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from penstock.kernels.ragged import RaggedBatch

# Queries of one piece: at least this many, and a share of the window, which all of them read again.
LEAST_PIECE = 128
WINDOW_SHARE = 4


def windowed(batch: RaggedBatch, window: int, slots: int) -> RaggedBatch:
    """The same T tokens as M >= N rows of positions and tables that begin with the first block in any query's window.

    `window` is at least 1. Where no row is longer than the window, the batch itself.
    """
    if int((batch.starts + batch.counts).max()) <= window:
        return batch
    rows, begins = _pieces(batch.counts, max(LEAST_PIECE, window // WINDOW_SHARE))
    offsets = np.append(batch.offsets[rows] + begins, batch.offsets[-1]).astype(np.int32)
    starts = batch.starts[rows] + begins
    first = np.maximum(starts - window + 1, 0) // slots
    widths = -(-(starts + np.diff(offsets)) // slots) - first
    columns = np.minimum(first[:, None] + np.arange(int(widths.max())), batch.block_tables.shape[1] - 1)
    tables = batch.block_tables[rows[:, None], columns]
    return RaggedBatch((starts - first * slots).astype(np.int32), offsets, tables)


def _pieces(counts: NDArray[np.int32], size: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """[M] row of each piece, [M] the new token of its row that it begins with."""
    pieces = -(-counts // size)
    rows = np.repeat(np.arange(len(counts)), pieces)
    begins = (np.arange(len(rows)) - np.repeat(np.cumsum(pieces) - pieces, pieces)) * size
    return rows, begins
