"""Rows come and go without traces."""

import numpy as np
import pytest
from fakes.scheduler_stand import make_request

from penstock.workers.errors import IntegrityError
from penstock.workers.protocol import SamplingParams
from penstock.workers.scheduler.events import SequenceKey, Work
from penstock.workers.scheduler.sequence import Sequence, context_of
from penstock.workers.scheduler.table import DECODE, LENGTH, NO_TOKEN, PREFILL, SequenceTable


def sequence(slot: int, stop: tuple[int, ...] = (), emitted: tuple[int, ...] = ()) -> Sequence:
    sampling = SamplingParams(9, temperature=0.5, seed=slot, stop_token_ids=stop)
    request = make_request([4, 5, 6], sampling=sampling, emitted=emitted)
    return Sequence(SequenceKey("a", slot, 3), Work.GENERATE, request, slot, 0, 1.0, context_of(request))


def test_insert_append_remove():
    table = SequenceTable(2, 20, 4)
    one = sequence(7, emitted=(8,))
    slot = table.insert(one, [3, 1], 2, PREFILL)
    assert one.slot == slot
    assert table.rows_in(PREFILL).tolist() == [slot]
    assert (table.length[slot], table.computed[slot], table.prompt_length[slot]) == (4, 2, 3)
    assert (table.capacity[slot], table.last_position[slot], table.last_token[slot]) == (8, 11, 8)
    rows = np.array([slot])
    fields = table.fields[:, rows]
    table.lengthen(rows, fields)
    assert (table.length[slot], table.state[slot]) == (5, DECODE)
    table.store_tokens(rows, fields[LENGTH], np.array([11], np.int32))
    assert table.tokens[slot, :5].tolist() == [4, 5, 6, 8, 11]
    assert table.last_token[slot] == 11
    table.append_blocks(np.array([slot]), [5])
    assert table.blocks_of(slot).tolist() == [3, 1, 5]
    assert table.capacity[slot] == 12
    table.remove(slot)
    assert one.slot is None
    assert not table.block_tables.any()
    assert table.num_sequences == 0
    with pytest.raises(IntegrityError, match="empty"):
        table.sequence_in(slot)


def test_a_row_in_use_is_not_given_twice():
    table = SequenceTable(2, 20, 4)
    slots = [table.insert(sequence(i), [i], 0, DECODE) for i in range(2)]
    assert sorted(slots) == [0, 1]
    assert table.is_full


def test_stop_ids_widen_for_whoever_needs_it_and_leave_no_trace():
    table = SequenceTable(3, 20, 4)
    first = table.insert(sequence(0, stop=(9,)), [0], 0, PREFILL)
    second = table.insert(sequence(1, stop=(1, 2, 3)), [1], 0, PREFILL)
    assert table.stop_ids[:, first].tolist() == [9, NO_TOKEN, NO_TOKEN]
    assert table.stop_ids[:, second].tolist() == [1, 2, 3]
    table.remove(second)
    again = table.insert(sequence(2), [1], 0, PREFILL)
    assert again == second
    assert table.stop_ids[:, again].tolist() == [NO_TOKEN] * 3
