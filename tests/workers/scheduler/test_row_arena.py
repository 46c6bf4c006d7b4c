"""Rows of any length in one array: what is put comes back, whatever else comes and goes."""

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.workers.scheduler.row_arena import RowArena, gather_ranges, offsets_of

ROWS = 5


@given(
    st.lists(
        st.tuples(st.integers(0, ROWS - 1), st.none() | st.lists(st.integers(0, 10**6), max_size=200)), max_size=40
    ),
    st.lists(st.integers(0, ROWS - 1), max_size=8),
)
@settings(deadline=None, max_examples=60)
def test_it_holds_what_a_dictionary_would(changes: list[tuple[int, list[int] | None]], asked: list[int]) -> None:
    arena, truth = RowArena(ROWS, np.int32), {row: [] for row in range(ROWS)}
    for row, values in changes:
        if values is None:
            arena.clear(row)
        else:
            arena.put(row, np.array(values, np.int32))
        truth[row] = values or []
    found, offsets = arena.take(np.array(asked, np.intp))
    assert found.dtype == offsets.dtype == np.int32
    assert [found[a:b].tolist() for a, b in itertools.pairwise(offsets)] == [truth[row] for row in asked]


def test_room_is_taken_back_from_rows_that_are_gone() -> None:
    arena = RowArena(2, np.float32)
    for _ in range(1000):
        arena.put(0, np.ones(100, np.float32))
        arena.clear(0)
    assert len(arena._flat) <= 512


def test_ranges_of_nothing() -> None:
    flat = np.arange(4, dtype=np.int32)
    values, offsets = gather_ranges(flat, np.array([2, 0]), np.array([0, 0]))
    assert (values.tolist(), offsets.tolist()) == ([], [0, 0, 0])
    assert offsets_of(np.array([2, 0, 3])).tolist() == [0, 2, 2, 5]
