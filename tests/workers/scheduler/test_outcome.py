"""Appending sampled tokens, ends, and rows that vanished while the step ran."""

import numpy as np
import pytest
from fakes.scheduler_stand import make_request

from penstock.workers.errors import IntegrityError
from penstock.workers.protocol import EndReason
from penstock.workers.scheduler.chunked import StepBudget, assemble, continue_prefills
from penstock.workers.scheduler.events import SequenceKey, Work
from penstock.workers.scheduler.judgement import judge_tokens
from penstock.workers.scheduler.outcome import committed_rows
from penstock.workers.scheduler.plan import SampledLogprobs, StepResult
from penstock.workers.scheduler.row_layout import RowLayout
from penstock.workers.scheduler.sequence import Sequence, context_of
from penstock.workers.scheduler.table import DECODE, LAST, LENGTH, PREFILL, SequenceTable


def filled_table(stops: list[tuple[int, ...]], max_tokens: int = 2, state: int = DECODE) -> SequenceTable:
    table = SequenceTable(len(stops), 16, 4)
    for arrival, stop in enumerate(stops):
        request = make_request([1, 2, 3], max_tokens, stop=stop)
        sequence = Sequence(SequenceKey("a", arrival, 0), Work.GENERATE, request, arrival, 0, 9.0, context_of(request))
        table.insert(sequence, [arrival], 2, state)
    return table


def sample(table: SequenceTable, slots, tokens: list[int]):
    """One token for each of these rows."""
    fields, sampled = table.fields[:, slots], np.array(tokens, np.int32)
    table.lengthen(slots, fields)
    table.store_tokens(slots, fields[LENGTH], sampled)
    return judge_tokens(table, slots, fields, sampled)


def test_stop_wins_over_length_and_padding_matches_nothing():
    table = filled_table([(7,), (), (5, 6, 7), (8,)])
    slots = np.arange(4)
    index, ends = sample(table, slots, [1, 7, 9, 8])
    assert index.tolist() == [0, 0, 0, 0]
    assert ends.tolist() == [EndReason.NONE, EndReason.NONE, EndReason.NONE, EndReason.STOP]
    assert table.state.tolist() == [DECODE] * 4
    index, ends = sample(table, slots[:3], [7, 7, 7])
    assert index.tolist() == [1, 1, 1]
    assert ends.tolist() == [EndReason.STOP, EndReason.LENGTH, EndReason.STOP]
    assert ends.dtype == np.uint8
    assert table.tokens[0, :5].tolist() == [1, 2, 3, 1, 7]
    assert table.length.tolist() == [5, 5, 5, 4]
    assert table.state.tolist() == [LAST, LAST, LAST, DECODE]


def test_rows_cancelled_during_the_step_are_left_out():
    table = filled_table([(), (), ()], state=PREFILL)
    budget = StepBudget(10, 0)
    continue_prefills(table, budget)
    step = assemble(table, RowLayout(table), 1, 0, budget)
    tokens = np.array([10, 11, 12], np.int32)
    column = np.arange(3, dtype=np.float32)
    logprobs = SampledLogprobs(column, np.zeros(3, np.int32), np.zeros((3, 0), np.int32), np.zeros((3, 0), np.float32))
    with pytest.raises(IntegrityError, match="2 tokens sampled for 3 rows"):
        committed_rows(step, StepResult(tokens[:2]), ())
    whole = committed_rows(step, StepResult(tokens, logprobs), ())
    assert whole.tokens is tokens
    rows = committed_rows(step, StepResult(tokens, logprobs), {1: None})
    assert rows.slots.tolist() == rows.sampled.tolist() == [0, 2]
    assert rows.tokens.tolist() == [10, 12]
    assert rows.logprobs is not None
    assert rows.logprobs.chosen.tolist() == [0, 2]
    assert rows.computed.tolist() == [3, 3]
