"""The budget of one step and the arrays of its plan."""

import numpy as np
from fakes.scheduler_stand import make_request
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.workers.scheduler.chunked import StepBudget, assemble, continue_prefills
from penstock.workers.scheduler.events import SequenceKey, Work
from penstock.workers.scheduler.row_layout import RowLayout
from penstock.workers.scheduler.sequence import Sequence, context_of
from penstock.workers.scheduler.table import DECODE, PREFILL, SequenceTable


def insert(table: SequenceTable, arrival: int, length: int, computed: int, state: int) -> int:
    request = make_request([arrival * 100 + i for i in range(length)], 9)
    sequence = Sequence(SequenceKey("a", arrival, 0), Work.GENERATE, request, arrival, 0, 1.0, context_of(request))
    blocks = [arrival * 10 + i for i in range(1, -(-length // table.block_size) + 1)]
    return table.insert(sequence, blocks, computed, state)


def test_chunks_go_to_the_oldest_first_within_budget_and_limit():
    table = SequenceTable(4, 64, 4)
    young, old = insert(table, 2, 20, 0, PREFILL), insert(table, 1, 20, 12, PREFILL)
    budget = StepBudget(14, 0)
    continue_prefills(table, budget)
    assert (budget.slots, budget.counts, budget.finishing) == ([old, young], [8, 6], [True, False])
    limited = StepBudget(14, 5)
    continue_prefills(table, limited)
    assert (limited.counts, limited.left) == ([5, 5], 4)


def test_the_plan_is_self_contained():
    table = SequenceTable(4, 64, 4)
    decoding, prefilling = insert(table, 3, 6, 5, DECODE), insert(table, 1, 9, 4, PREFILL)
    budget = StepBudget(31, 0)
    continue_prefills(table, budget)
    plan = assemble(table, RowLayout(table), 7, 1, budget).plan
    assert plan.step == 7
    assert plan.num_decode == 1
    assert plan.slots.tolist() == [decoding, prefilling]
    assert plan.starts.tolist() == [5, 4]
    assert plan.offsets.tolist() == [0, 1, 6]
    assert plan.token_ids.tolist() == [305, 104, 105, 106, 107, 108]
    assert plan.block_tables.tolist() == [[31, 32, 0], [11, 12, 13]]
    assert plan.sample_rows.tolist() == [0, 1]
    assert plan.sampling.position.tolist() == [6, 9]
    assert plan.copies.shape == (0, 2)
    for column in (plan.slots, plan.starts, plan.offsets, plan.token_ids, plan.block_tables, plan.sample_rows):
        assert column.dtype == np.int32


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=5), st.integers(1, 40), st.integers(0, 12))
def test_steps_compute_every_token_once_within_budget(lengths, tokens, limit):
    table = SequenceTable(5, 64, 4)
    for arrival, length in enumerate(lengths):
        insert(table, arrival, length, 0, PREFILL)
    layout = RowLayout(table)
    for _ in range(200):
        budget = StepBudget(tokens, limit)
        continue_prefills(table, budget)
        if not budget.slots:
            break
        step = assemble(table, layout, 1, 0, budget)
        assert step.plan.num_tokens <= tokens
        assert np.diff(step.plan.offsets).max() <= (limit or tokens)
        assert (step.plan.starts == table.computed[step.rows.slots]).all()
        table.computed[step.rows.slots] = step.rows.computed
    assert (table.computed == table.length).all()
