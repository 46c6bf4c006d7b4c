"""What rows wish for becomes the batch's edits: against a plain definition, in any order, while rows come and go."""

from __future__ import annotations

import dataclasses

import numpy as np
from fakes.plain_edits import banned_tokens
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.workers.protocol import SamplingParams
from penstock.workers.scheduler.edits import EditColumns
from penstock.workers.scheduler.plan import LogitEdits

VOCAB, LONGEST = 6, 12
TOKENS = st.integers(0, VOCAB - 1)
LISTS = st.lists(TOKENS, max_size=3).map(tuple)
WISHES = st.builds(
    SamplingParams,
    max_tokens=st.just(99),
    stop_token_ids=LISTS,
    presence_penalty=st.sampled_from([0.0, 0.0, 0.5]),
    frequency_penalty=st.sampled_from([0.0, 0.0, -0.5]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.5]),
    logit_bias=st.lists(st.tuples(TOKENS, st.sampled_from([-1.0, 2.0])), max_size=2, unique_by=lambda b: b[0]).map(
        tuple
    ),
    bad_words=st.lists(st.lists(TOKENS, min_size=1, max_size=4).map(tuple), max_size=4).map(tuple),
    allowed_token_ids=st.none() | st.lists(TOKENS, min_size=1, max_size=3).map(tuple),
    min_tokens=st.integers(0, 6),
)
ROWS = st.tuples(WISHES, st.lists(TOKENS, min_size=1, max_size=6).map(tuple), st.lists(TOKENS, max_size=6).map(tuple))


class Table:
    """The columns that `EditColumns` reads, filled by hand."""

    def __init__(self, rows: int) -> None:
        self.tokens = np.full((rows, LONGEST), VOCAB - 1, np.int32)
        self.length = np.zeros(rows, np.int32)
        self.prompt_length = np.zeros(rows, np.int32)
        self.edits = EditColumns(self.tokens, self.length, self.prompt_length)

    def fill(self, slot: int, sampling: SamplingParams, prompt: tuple[int, ...], generated: tuple[int, ...]) -> None:
        context = prompt + generated
        self.tokens[slot, : len(context)] = context
        self.length[slot], self.prompt_length[slot] = len(context), len(prompt)
        self.edits.fill(slot, sampling, np.array(prompt, np.int32))


def cut(values: np.ndarray, offsets: np.ndarray, row: int) -> list:
    return values[offsets[row] : offsets[row + 1]].tolist()


def check_row(edits: LogitEdits, row: int, wish: tuple) -> None:
    sampling, prompt, generated = wish
    penalties = (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty)
    assert (edits.presence[row], edits.frequency[row], edits.repetition[row]) == penalties
    wants = penalties != (0.0, 0.0, 1.0)
    assert cut(edits.generated, edits.generated_offsets, row) == (list(generated) if wants else [])
    distinct = sorted(set(prompt)) if sampling.repetition_penalty != 1 else []
    assert cut(edits.prompt, edits.prompt_offsets, row) == distinct
    biases = zip(
        cut(edits.bias_ids, edits.bias_offsets, row), cut(edits.bias_values, edits.bias_offsets, row), strict=True
    )
    assert tuple(biases) == sampling.logit_bias
    assert cut(edits.allowed, edits.allowed_offsets, row) == sorted(set(sampling.allowed_token_ids or ()))
    assert set(cut(edits.banned, edits.banned_offsets, row)) == banned_tokens(sampling, prompt, generated)


@given(st.lists(ROWS, min_size=1, max_size=5), st.data())
@settings(deadline=None, max_examples=80)
def test_every_row_gets_its_own_edits(wishes: list[tuple], data: st.DataObject) -> None:
    table = Table(len(wishes) + 2)
    for slot in data.draw(st.permutations(range(len(wishes)))):
        table.fill(slot, *wishes[slot])
    slots = data.draw(st.lists(st.sampled_from(range(len(wishes))), min_size=1, unique=True))
    edits = table.edits.batch(np.array(slots))
    if edits is None:
        edits = none_for(len(slots))
        slots = [slot for slot in slots if not _neutral(wishes[slot])]
        assert slots == []
    for row, slot in enumerate(slots):
        check_row(edits, row, wishes[slot])
    for column in dataclasses.fields(edits):
        assert getattr(edits, column.name).dtype in (np.int32, np.float32), column.name


def none_for(rows: int) -> LogitEdits:
    none, offsets = np.zeros(0, np.int32), np.zeros(rows + 1, np.int32)
    zeros = np.zeros(rows, np.float32)
    biases = np.zeros(0, np.float32)
    return LogitEdits(zeros, zeros, zeros + 1, *(none, offsets) * 2, none, biases, offsets, *(none, offsets) * 2)


def _neutral(wish: tuple) -> bool:
    """Nothing to do in this step, whatever is wished."""
    sampling, prompt, generated = wish
    lists = sampling.logit_bias or sampling.allowed_token_ids is not None
    counts = (sampling.presence_penalty or sampling.frequency_penalty) and generated
    repeats = sampling.repetition_penalty != 1
    return not (lists or counts or repeats or banned_tokens(sampling, prompt, generated))


@given(st.lists(st.tuples(st.integers(0, 2), ROWS), max_size=12))
@settings(deadline=None, max_examples=60)
def test_a_row_that_is_emptied_leaves_nothing(history: list[tuple[int, tuple]]) -> None:
    table = Table(3)
    for slot, wish in history:
        table.edits.empty(slot)
        table.fill(slot, *wish)
    for slot in range(3):
        table.edits.empty(slot)
    assert table.edits.active == 0
    table.fill(0, SamplingParams(9, presence_penalty=1.0), (1, 2), (3,))
    table.fill(1, SamplingParams(9), (1, 2), (3,))
    edits = table.edits.batch(np.arange(3))
    assert edits is not None
    for row, wish in enumerate(
        [(SamplingParams(9, presence_penalty=1.0), (1, 2), (3,)), (SamplingParams(9), (1,), ())]
    ):
        check_row(edits, row, wish)
    assert not table.edits.min_tokens.any()


def test_a_batch_in_which_nobody_asks_has_no_edits() -> None:
    table = Table(3)
    table.fill(0, SamplingParams(9, stop_token_ids=(1,)), (1, 2), (3,))
    assert table.edits.batch(np.arange(3)) is None
    table.fill(1, SamplingParams(9, stop_token_ids=(1,), min_tokens=2), (1, 2), (3, 4))
    assert table.edits.batch(np.arange(3)) is None  # its time has passed
    assert table.edits.batch(np.array([0])) is None


def test_a_bad_word_longer_than_the_context_sees_no_other_row() -> None:
    table = Table(2)
    table.fill(0, SamplingParams(9), (1,), ())
    table.tokens[0] = 3  # what a longer sequence left behind, right before row 1
    table.fill(1, SamplingParams(9, bad_words=((3, 3, 4, 5),)), (4,), ())
    assert table.edits.batch(np.array([1])) is None


def test_a_bad_word_may_begin_with_the_whole_context() -> None:
    table = Table(1)
    table.fill(0, SamplingParams(9, bad_words=((1, 2, 3, 5), (0, 1, 2, 3, 4))), (1, 2), (3,))
    edits = table.edits.batch(np.array([0]))
    assert edits is not None
    assert edits.banned.tolist() == [5]
