"""The rows gathered in C++ are those of the definition in numpy, step after step."""

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
from penstock.workers.scheduler.native_rows import NativeRows, gatherer_for
from penstock.workers.scheduler.row_layout import RowLayout
from penstock.workers.scheduler.sequence import Sequence, context_of
from penstock.workers.scheduler.table import DECODE, PREFILL, SequenceTable

SEQS, BLOCK, LENGTH = 7, 4, 200

needs_compiler = pytest.mark.skipif(library.load() is None, reason="no C++ compiler")


def insert(table: SequenceTable, number: int, length: int, state: int) -> int:
    sampling = SamplingParams(9, temperature=number / 7, seed=(1 << 64) - number, top_k=number, choice=number % 3)
    request = make_request(list(range(number * 1000, number * 1000 + length)), sampling=sampling)
    sequence = Sequence(SequenceKey("a", number, 0), Work.GENERATE, request, number, 0, 1.0, context_of(request))
    blocks = np.arange(number * 50, number * 50 - (-length // BLOCK))
    return table.insert(sequence, blocks, length - 1 if state == DECODE else 0, state)


@needs_compiler
@settings(deadline=None, max_examples=150)
@given(st.data(), st.lists(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 190)), max_size=4), max_size=12))
def test_both_gather_the_same(data, steps):
    table = SequenceTable(SEQS, LENGTH, BLOCK)
    native, numpy = gatherer_for(table), RowLayout(table)
    assert isinstance(native, NativeRows)
    number = 0
    for changes in steps:
        for what, size in changes:
            running = [slot for slot, sequence in enumerate(table.sequences) if sequence is not None]
            number += 1
            if what < 2 and not table.is_full:
                insert(table, number, size, DECODE if what else PREFILL)
            elif what == 2 and running:
                table.remove(running[size % len(running)])
            elif running and table.num_blocks[running].max() < LENGTH // BLOCK:
                table.append_blocks(np.array(running), np.arange(len(running)) + number)
        prefills = table.rows_in(PREFILL).tolist()
        chunks = prefills[: data.draw(st.integers(0, len(prefills)))]
        counts = [data.draw(st.integers(1, int(table.length[slot]))) for slot in chunks]
        num_decode = len(table.rows_in(DECODE))
        if not num_decode + len(chunks):
            continue
        for name, mine, theirs in zip(
            native_rows.StepRows._fields,
            native.gather(num_decode, chunks, counts),
            numpy.gather(num_decode, chunks, counts),
            strict=True,
        ):
            assert mine.dtype == theirs.dtype, name
            assert mine.tolist() == theirs.tolist(), name
        table.state[chunks] = DECODE


@needs_compiler
def test_rows_that_do_not_add_up_are_a_defect():
    table = SequenceTable(SEQS, LENGTH, BLOCK)
    insert(table, 1, 5, DECODE)
    with pytest.raises(IntegrityError, match="2 rows are planned to decode"):
        gatherer_for(table).gather(2, [], [])


def test_numpy_serves_where_there_is_no_compiler(monkeypatch, caplog):
    def fail(*_):
        raise library.BuildError("no C++ compiler")

    monkeypatch.setattr(library, "compiled", fail)
    monkeypatch.setattr(native_rows, "load", library.load.__wrapped__)
    with caplog.at_level(logging.WARNING):
        assert isinstance(gatherer_for(SequenceTable(SEQS, LENGTH, BLOCK)), RowLayout)
    assert "numpy serves instead: no C++ compiler" in caplog.text
