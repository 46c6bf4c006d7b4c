"""What C++ reads of the table and writes to it is what the definition in numpy does, step after step."""

import logging

import numpy as np
import pytest
from fakes.scheduler_stand import make_request
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.workers.errors import IntegrityError
from penstock.workers.native import library
from penstock.workers.protocol import SamplingParams
from penstock.workers.scheduler import native_rows
from penstock.workers.scheduler.events import SequenceKey, Work
from penstock.workers.scheduler.native_rows import NativeRows, steps_over
from penstock.workers.scheduler.row_layout import RowLayout
from penstock.workers.scheduler.sequence import Sequence, context_of
from penstock.workers.scheduler.table import DECODE, LAST, PREFILL, SequenceTable

SEQS, BLOCK, LENGTH = 7, 4, 200

needs_compiler = pytest.mark.skipif(library.load() is None, reason="no C++ compiler")


def insert(table: SequenceTable, number: int, length: int, state: int) -> int:
    sampling = SamplingParams(
        1 + number % 5,
        temperature=number / 7,
        seed=(1 << 64) - number,
        top_k=number,
        choice=number % 3,
        stop_token_ids=tuple(range(number % 4)),
        min_tokens=number % 3,
    )
    request = make_request(list(range(number * 1000, number * 1000 + length)), sampling=sampling)
    sequence = Sequence(SequenceKey("a", number, 0), Work.GENERATE, request, number, 0, 1.0, context_of(request))
    blocks = np.arange(number * 50, number * 50 - (-length // BLOCK))
    return table.insert(sequence, blocks, length - 1 if state == DECODE else 0, state)


def change(table: SequenceTable, number: int, what: int, size: int) -> None:
    running = [slot for slot, sequence in enumerate(table.sequences) if sequence is not None]
    if what < 2 and not table.is_full:
        insert(table, number, size, DECODE if what else PREFILL)
    elif what == 2 and running:
        table.remove(running[size % len(running)])
    elif running and table.num_blocks[running].max() < LENGTH // BLOCK:
        table.append_blocks(np.array(running), np.arange(len(running)) + number)


def assert_same(one, other) -> None:
    """Arrays, or tuples of arrays, of one type and content."""
    for mine, theirs in zip(one, other, strict=True):
        assert mine.dtype == theirs.dtype
        assert mine.tolist() == theirs.tolist()


def contents(table: SequenceTable) -> list:
    return [table.state.tolist(), table.fields.tolist(), table.tokens.tolist()]


@needs_compiler
@settings(deadline=None, max_examples=100)
@given(st.data(), st.lists(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 190)), max_size=4), max_size=12))
def test_both_do_the_same(data, changes):
    """Two tables that everything happens to, each with one of the two; some tokens stop, some rows are full."""
    tables = [SequenceTable(SEQS, LENGTH, BLOCK) for _ in range(2)]
    native, numpy = steps_over(tables[0]), RowLayout(tables[1])
    assert isinstance(native, NativeRows)
    table, number = tables[0], 0
    for step in changes:
        for what, size in step:
            number += 1
            for one in tables:
                change(one, number, what, size)
        num_decode, full = native.ready()
        assert (num_decode, full.tolist()) == (numpy.ready()[0], numpy.ready()[1].tolist())
        prefills = table.rows_in(PREFILL).tolist()
        chunks = prefills[: data.draw(st.integers(0, len(prefills)))]
        left = [int(table.length[slot] - table.computed[slot]) for slot in chunks]
        counts = [data.draw(st.integers(1, count)) for count in left]
        if not num_decode + len(chunks):
            continue
        rows = [one.gather(num_decode, chunks, counts) for one in (native, numpy)]
        assert_same(*(one[:-1] for one in rows))
        finishing = [True] * num_decode + [count == most for count, most in zip(counts, left, strict=True)]
        sampling = np.flatnonzero(finishing).astype(np.int32)
        tokens = np.array(data.draw(st.lists(st.integers(0, 4), min_size=len(sampling), max_size=len(sampling))), "i4")
        for one, own in zip((native, numpy), rows, strict=True):
            one.advance(own, sampling)
        assert contents(tables[0]) == contents(tables[1])
        ends = [one.take_tokens(own, sampling, tokens) for one, own in zip((native, numpy), rows, strict=True)]
        assert_same(*ends)
        assert contents(tables[0]) == contents(tables[1])
        for slot in np.flatnonzero(table.state == LAST).tolist():
            for one in tables:
                one.remove(slot)


@needs_compiler
def test_rows_that_do_not_add_up_are_a_defect():
    table = SequenceTable(SEQS, LENGTH, BLOCK)
    insert(table, 1, 5, DECODE)
    with pytest.raises(IntegrityError, match="2 rows are planned to decode"):
        steps_over(table).gather(2, [], [])


def test_numpy_serves_where_there_is_no_compiler(monkeypatch, caplog):
    def fail(*_):
        raise library.BuildError("no C++ compiler")

    monkeypatch.setattr(library, "compiled", fail)
    monkeypatch.setattr(native_rows, "load", library.load.__wrapped__)
    with caplog.at_level(logging.WARNING):
        assert isinstance(steps_over(SequenceTable(SEQS, LENGTH, BLOCK)), RowLayout)
    assert "numpy serves instead: no C++ compiler" in caplog.text
