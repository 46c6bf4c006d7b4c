"""Batched logit edits against one row spelled out in float64; rows do not see each other; nothing ever gets stuck."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from fakes.plain_edits import edit_row
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.workers.logit_edits import apply_edits, edited_rows, select_rows
from penstock.workers.protocol import SamplingParams
from penstock.workers.scheduler.edits import EditColumns
from penstock.workers.scheduler.plan import LogitEdits

VOCAB = 12
TOKENS = st.integers(0, VOCAB - 1)
WISHES = st.builds(
    SamplingParams,
    max_tokens=st.just(99),
    stop_token_ids=st.lists(st.integers(0, VOCAB + 3), max_size=VOCAB).map(tuple),  # some are no tokens of the model
    presence_penalty=st.sampled_from([0.0, 0.7, -1.5]),
    frequency_penalty=st.sampled_from([0.0, 0.3, -0.25]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.7, 30.0]),
    logit_bias=st.lists(
        st.tuples(TOKENS, st.floats(-100, 100, width=32)), max_size=4, unique_by=lambda bias: bias[0]
    ).map(tuple),
    bad_words=st.lists(st.lists(TOKENS, min_size=1, max_size=3).map(tuple), max_size=5).map(tuple),
    allowed_token_ids=st.none() | st.lists(TOKENS, min_size=1, max_size=4).map(tuple),
    min_tokens=st.sampled_from([0, 0, 3, 50]),
)
CONTEXTS = st.tuples(st.lists(TOKENS, min_size=1, max_size=8).map(tuple), st.lists(TOKENS, max_size=10).map(tuple))
GRAMMARS = st.none() | st.sets(TOKENS, min_size=1)  # the tokens that a grammar allows next
Row = tuple[SamplingParams, tuple[tuple[int, ...], tuple[int, ...]]]


class FixedGuide:
    """Allows these tokens."""

    def __init__(self, allowed: set[int]) -> None:
        self.mask = np.array([sum(1 << token for token in allowed)], np.int32)

    def advance(self, token: int) -> None:
        raise AssertionError("nothing is sampled here")


def edits_of(rows: list[Row], grammars: Sequence[set[int] | None] = ()) -> LogitEdits | None:
    """As the scheduler makes them."""
    guides = [None if allowed is None else FixedGuide(allowed) for allowed in grammars] or [None] * len(rows)
    longest = max(len(prompt) + len(generated) for _, (prompt, generated) in rows)
    tokens = np.zeros((len(rows), longest), np.int32)
    length, prompt_length = np.zeros(len(rows), np.int32), np.zeros(len(rows), np.int32)
    columns = EditColumns(tokens, length, prompt_length)
    for slot, (sampling, (prompt, generated)) in enumerate(rows):
        tokens[slot, : len(prompt) + len(generated)] = prompt + generated
        length[slot], prompt_length[slot] = len(prompt) + len(generated), len(prompt)
        columns.fill(slot, sampling, np.array(prompt, np.int32), guides[slot])
    return columns.batch(np.arange(len(rows)))


def edited(logits: torch.Tensor, rows: list[Row], grammars: Sequence[set[int] | None] = ()) -> torch.Tensor:
    edits, result = edits_of(rows, grammars), logits.clone()
    if edits is not None:
        apply_edits(result, edits)
    return result


@given(st.lists(st.tuples(WISHES, CONTEXTS, GRAMMARS), min_size=1, max_size=6), st.integers(0, 5))
@settings(deadline=None, max_examples=150)
def test_every_row_follows_the_definition(given_rows: list[Any], seed: int) -> None:
    rows, grammars = [row[:2] for row in given_rows], [row[2] for row in given_rows]
    logits = torch.randn(len(rows), VOCAB, generator=torch.Generator().manual_seed(seed)) * 4
    found = edited(logits, rows, grammars)
    for row, (sampling, (prompt, generated)) in enumerate(rows):
        plain = edit_row(logits[row].tolist(), sampling, prompt, generated, grammars[row])
        wanted = torch.tensor(plain, dtype=torch.float64)
        assert torch.equal(found[row].isneginf(), wanted.isneginf())
        torch.testing.assert_close(found[row].double(), wanted, rtol=1e-5, atol=1e-4)
        assert not found[row].isneginf().all()


@given(st.lists(st.tuples(WISHES, CONTEXTS), min_size=1, max_size=8), st.data())
@settings(deadline=None, max_examples=80)
def test_a_row_is_the_same_alone_and_in_any_company(rows: list[Row], data: st.DataObject) -> None:
    """To the bit."""
    logits = torch.randn(len(rows), VOCAB, generator=torch.Generator().manual_seed(7)) * 4
    together, edits = edited(logits, rows), edits_of(rows)
    for row in range(len(rows)):
        assert torch.equal(edited(logits[row : row + 1], rows[row : row + 1])[0], together[row])
    if edits is None:
        return
    picked = np.array(data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1)))
    piece = logits[torch.from_numpy(picked)]
    apply_edits(piece, select_rows(edits, picked))
    assert torch.equal(piece, together[torch.from_numpy(picked)])
    changed = (together != logits).any(dim=-1).numpy()
    assert not (changed & ~edited_rows(edits)).any()


@pytest.mark.parametrize(
    ("wish", "expected"),
    [
        ({"bad_words": tuple((token,) for token in range(VOCAB))}, 5),
        ({"bad_words": ((3,), (9,), (4, 9)), "allowed_token_ids": (3, 9)}, 9),
        ({"stop_token_ids": (2,), "min_tokens": 9, "allowed_token_ids": (2,)}, 2),
        ({"bad_words": ((1, 2, 7),), "allowed_token_ids": (7, 7)}, 7),
    ],
)
def test_where_all_is_banned_the_bans_give_way_but_not_the_allowed_list(wish: dict[str, Any], expected: int) -> None:
    logits = torch.linspace(0, 1, VOCAB)[None].clone()
    logits[0, 5] = 2.0
    found = edited(logits, [(SamplingParams(9, **wish), ((1,), (2,)))])
    assert not found.isnan().any()
    assert int(found.argmax()) == expected


def test_many_occurrences_are_counted_exactly() -> None:
    logits = torch.full((1, VOCAB), 1.0)
    found = edited(logits, [(SamplingParams(9, frequency_penalty=0.001), ((0,), (4,) * 5000 + (6,) * 3))])
    assert found[0, 4].item() == pytest.approx(1.0 - 5.0, abs=1e-6)
    assert found[0, 6].item() == pytest.approx(1.0 - 0.003, abs=1e-6)
    assert (found[0, [0, 1, 2, 3, 5, 7]] == 1.0).all()


def test_extreme_values_stay_finite() -> None:
    wish = SamplingParams(
        9, repetition_penalty=1e-6, frequency_penalty=1e6, presence_penalty=-1e6, logit_bias=((3, 1e6), (4, -1e6))
    )
    found = edited(torch.full((1, VOCAB), 60.0), [(wish, ((3, 4), (3,) * 100))])
    assert found.isfinite().all()
    assert not math.isnan(float(torch.softmax(found / 1e-5, -1).sum()))
