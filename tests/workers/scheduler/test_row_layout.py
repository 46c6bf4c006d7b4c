"""Rows keep their places, and laid-out block tables are always those of the table."""

import numpy as np
from fakes.scheduler_stand import make_request
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.workers.scheduler.events import SequenceKey, Work
from penstock.workers.scheduler.row_layout import RowLayout
from penstock.workers.scheduler.sequence import Sequence, context_of
from penstock.workers.scheduler.table import DECODE, SequenceTable

SEQS, BLOCK, LENGTH = 6, 4, 160


def insert(table: SequenceTable, number: int, blocks: int) -> int:
    request = make_request([number] * 3, 9)
    sequence = Sequence(SequenceKey("a", number, 0), Work.GENERATE, request, number, 0, 1.0, context_of(request))
    return table.insert(sequence, np.arange(number, number + blocks, dtype=np.int32), 2, DECODE)


def test_rows_stay_where_they_are_and_the_last_ones_fill_holes():
    table = SequenceTable(SEQS, LENGTH, BLOCK)
    layout = RowLayout(table)
    for number in range(1, 6):
        insert(table, number, 1)
    layout.lay_out(layout.order(np.array([0, 1, 2, 3, 4])), 1)
    assert layout.order(np.array([4, 3, 2, 1, 0])).tolist() == [0, 1, 2, 3, 4]
    assert layout.order(np.array([0, 2, 3, 4])).tolist() == [0, 4, 2, 3]
    assert layout.order(np.array([0, 2, 3, 4, 5])).tolist() == [0, 5, 2, 3, 4]
    assert layout.order(np.array([5])).tolist() == [5]
    assert layout.order(np.array([], np.intp)).tolist() == []


@settings(deadline=None, max_examples=80)
@given(st.lists(st.tuples(st.integers(0, 3), st.randoms(), st.integers(0, 2)), max_size=40))
def test_laid_out_tables_are_those_of_the_table(steps):
    table = SequenceTable(SEQS, LENGTH, BLOCK)
    layout = RowLayout(table)
    number = 0
    for what, random, prefills in steps:
        running = [slot for slot, sequence in enumerate(table.sequences) if sequence is not None]
        if what == 0 and not table.is_full:
            number += 1
            insert(table, number * 50, random.randint(1, 20))
        elif what == 1 and running:
            table.remove(random.choice(running))
        elif what == 2 and running:
            grown = np.array(random.sample(running, random.randint(1, len(running))))
            grown = grown[table.num_blocks[grown] < table.block_tables.shape[1]]
            number += 1
            table.append_blocks(grown, np.arange(number * 50, number * 50 + len(grown), dtype=np.int32))
        running = [slot for slot, sequence in enumerate(table.sequences) if sequence is not None]
        others = random.sample(running, min(prefills, len(running)))
        decode = [slot for slot in running if slot not in others and random.random() < 0.8]
        order = layout.order(np.array(decode, np.intp))
        assert sorted(order.tolist()) == decode
        slots = np.concatenate((order, np.array(others, np.intp)))
        if len(slots):
            width = int(table.num_blocks[slots].max())
            assert layout.lay_out(slots, width).tolist() == table.block_tables[slots, :width].tolist()
