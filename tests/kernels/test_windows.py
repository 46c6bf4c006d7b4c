"""Cutting a batch short for a window: distances and blocks are kept, and no more blocks than needed."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.kernels.cpu.windows import LEAST_PIECE, windowed
from penstock.kernels.ragged import RaggedBatch

SLOTS = 4


def batch_of(rows):
    starts, counts = np.array(rows, np.int32).T
    width = int((starts + counts).max()) // SLOTS + 1
    tables = np.arange(len(rows) * width, dtype=np.int32).reshape(len(rows), width)
    return RaggedBatch(starts, np.concatenate([[0], np.cumsum(counts)]).astype(np.int32), tables)


def seen(batch, window):
    """For every token, the (block, slot) of each key that it attends to."""
    found = []
    for row, (start, count) in enumerate(zip(batch.starts.tolist(), batch.counts.tolist(), strict=True)):
        for position in range(start, start + count):
            keys = range(max(0, position - window + 1), position + 1)
            found.append([(int(batch.block_tables[row, key // SLOTS]), key % SLOTS) for key in keys])
    return found


@given(
    st.lists(st.tuples(st.integers(0, 90), st.integers(1, 160)), min_size=1, max_size=4),
    st.integers(1, 100),
)
@settings(max_examples=30, deadline=None)
def test_every_token_sees_the_same_keys(rows, window):
    batch = batch_of(rows)
    cut = windowed(batch, window, SLOTS)
    assert seen(cut, window) == seen(batch, window)
    if cut is not batch:
        assert (cut.starts < window + SLOTS).all()
        assert (cut.counts >= 1).all()
        assert int(cut.counts.max()) <= max(LEAST_PIECE, window // 4)


def test_what_is_no_longer_than_the_window_stays():
    batch = batch_of([(10, 6), (0, 16), (3, 1)])
    assert windowed(batch, 16, SLOTS) is batch
    assert windowed(batch, 15, SLOTS) is not batch


def test_first_blocks():
    cut = windowed(batch_of([(30, 1), (31, 2), (2, 3)]), 4, SLOTS)
    assert cut.starts.tolist() == [6, 3, 2]  # the first keys are 27, 28 and 0, in blocks 6, 7 and 0
    assert cut.block_tables[:, 0].tolist() == [6, 9 + 7, 18 + 0]
