"""Placements: shares in fixed point, levelling against a linear program's bound, and what losing ranks leaves."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.workers.errors import IntegrityError
from penstock.workers.parallel.expert_placement import (
    WHOLE,
    ExpertPlacement,
    cuts_from_shares,
    even_cuts,
    holders_of,
    level_shares,
)


def placement(slots, experts):
    array = np.array(slots, dtype=np.int32)
    made = ExpertPlacement(experts, array, even_cuts(holders_of(array, experts)))
    made.check_integrity()
    return made


def test_equal_parts_of_three_add_up():
    made = placement([[[0, 1], [0, -1], [1, 0]]], 2)
    assert np.diff(made.cuts[0, 0]).tolist() == [349525, 349525, 349526]
    assert np.diff(made.cuts[0, 1]).tolist() == [WHOLE // 2, 0, WHOLE // 2]
    assert made.gone() == ()
    assert made.rank_load(np.array([[6.0, 4.0]]))[0] == pytest.approx([4.0, 2.0, 4.0], abs=1e-4)


def test_losses_go_to_the_other_copies_and_the_last_is_gone():
    made = placement([[[0, 1], [0, 2], [1, 0]]], 3)
    without = made.without(frozenset({1}))
    without.check_integrity()
    assert without.shares()[0, 0].tolist() == [0.5, 0.0, 0.5]
    assert without.gone() == ((0, 2),)
    assert without.cuts[0, 2].tolist() == [0, 0, 0, 0]
    assert np.array_equal(without.cuts[0, 1], made.cuts[0, 1]), "who lost nothing keeps its shares"
    assert without.without(frozenset({0, 2})).gone() == ((0, 0), (0, 1), (0, 2))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"slots": np.array([[[0, 5]]], dtype=np.int32)}, "outside 0 .. 1"),
        ({"slots": np.array([[[1, 1]]], dtype=np.int32)}, "an expert twice"),
        ({"slots": np.array([[[1, -1]]], dtype=np.int32)}, "a rank without the expert"),
        ({"cuts": np.array([[[0, WHOLE], [0, WHOLE - 1]]], dtype=np.int32)}, "do not add up"),
        ({"cuts": np.zeros((1, 2, 3), dtype=np.int32)}, "cuts .* for slots"),
    ],
)
def test_what_does_not_hold_together_is_found(change, reason):
    with pytest.raises(IntegrityError, match=reason):
        dataclasses.replace(placement([[[0, 1]]], 2), **change).check_integrity()


def least_fullest(tokens, held):
    """Least load of the fullest rank: for every set of ranks, experts that live only there must be computed there."""
    ranks = held.shape[1]
    bounds = [tokens.sum() / ranks]
    for size in range(1, ranks):
        for group in itertools.combinations(range(ranks), size):
            outside = [rank for rank in range(ranks) if rank not in group]
            bounds.append(tokens[~held[:, outside].any(axis=1)].sum() / size)
    return max(bounds)


@given(st.integers(1, 4), st.integers(1, 7), st.integers(0, 10_000))
@settings(max_examples=80, deadline=None)
def test_levelled_shares_meet_the_bound_of_the_copies(ranks, experts, seed):
    chance = np.random.default_rng(seed)
    held = chance.random((experts, ranks)) < 0.5
    held[np.arange(experts), chance.integers(0, ranks, experts)] = True
    tokens = chance.exponential(size=experts)
    shares = level_shares(tokens[None], held[None], sweeps=400)[0]
    assert shares.sum(axis=1) == pytest.approx(np.ones(experts))
    assert (shares[~held] == 0).all()
    assert (tokens @ shares).max() == pytest.approx(least_fullest(tokens, held), rel=1e-3)
    cuts = cuts_from_shares(shares[None], held[None])
    assert np.abs(np.diff(cuts[0], axis=1) / WHOLE - shares).max() <= 2 / WHOLE


def test_shares_of_an_expert_without_copy_or_load():
    held = np.array([[[False, False], [True, True]]])
    assert cuts_from_shares(np.zeros((1, 2, 2)), held)[0].tolist() == [[0, 0, 0], [0, WHOLE // 2, WHOLE]]
    assert level_shares(np.zeros((1, 2)), held)[0].tolist() == [[0, 0], [0.5, 0.5]]
