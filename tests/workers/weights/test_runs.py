"""A piece of a tensor as runs of bytes: every byte once, in the tensor's order, within what one request may ask for."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.workers.weights.runs import MAX_RUN_BYTES, MAX_SPAN_BYTES, Run, contiguous, runs_of


def read(data: bytes, runs) -> bytes:
    rows = ((run.begin + row * run.stride, run.length) for run in runs for row in range(run.count))
    return b"".join(data[begin : begin + length] for begin, length in rows)


@given(
    shape=st.lists(st.integers(1, 7), min_size=1, max_size=3),
    cuts=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 7)), min_size=3, max_size=3),
    before=st.integers(0, 20),
)
@settings(max_examples=200, deadline=None)
def test_every_part_of_a_tensor(shape: list[int], cuts: list[tuple[int, int]], before: int) -> None:
    whole = torch.arange(torch.Size(shape).numel(), dtype=torch.int16).view(shape)
    part = whole[tuple(slice(min(a, b), max(a, b)) for a, b in cuts[: len(shape)])]
    begin = before + part.storage_offset() * 2
    runs = list(runs_of(begin, part.shape, [stride * 2 for stride in part.stride()], 2))
    assert all(run.allowed for run in runs)
    assert read(bytes(before) + whole.numpy().tobytes(), runs) == part.contiguous().numpy().tobytes()


def test_large_parts_are_cut_into_what_may_be_asked() -> None:
    rows = list(runs_of(0, (3, 4 * MAX_RUN_BYTES), (8 * MAX_RUN_BYTES, 1), 1))
    assert len(rows) == 12
    columns = list(runs_of(64, (4096, 100), (1 << 14, 1), 1))
    assert all(run.allowed for run in (*rows, *columns))
    assert sum(run.size for run in columns) == 409600
    assert len(columns) == 4096 * (1 << 14) // MAX_SPAN_BYTES + 1
    assert [run.begin for run in contiguous(5, 2 * MAX_RUN_BYTES + 1)] == [5, 5 + MAX_RUN_BYTES, 5 + 2 * MAX_RUN_BYTES]


def test_what_may_not_be_asked() -> None:
    assert Run(0, 4, 4, 3).allowed
    for run in (Run(0, 0), Run(0, 8, 4, 2), Run(0, MAX_RUN_BYTES + 1), Run(0, 8, MAX_SPAN_BYTES, 2), Run(0, 1, 1, 0)):
        assert not run.allowed, run
