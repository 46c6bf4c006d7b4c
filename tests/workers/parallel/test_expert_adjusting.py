"""Mending and levelling by few changes: copies are never lost to it, and it says when it cannot."""

import numpy as np
import pytest

from penstock.workers.parallel.expert_adjusting import adjusted, mended
from penstock.workers.parallel.expert_load import skew
from penstock.workers.parallel.expert_placement import level_shares


def shares(tokens, held):
    return level_shares(tokens[None], held[None])[0]


def skew_of(tokens, held):
    return skew((tokens @ shares(tokens, held))[None])


def test_one_swap_is_enough_for_two_hot_experts_on_one_rank():
    tokens = np.array([10.0, 10.0, 1.0, 1.0])
    held = np.array([[1, 0], [1, 0], [0, 1], [0, 1]], dtype=bool)
    found = adjusted(tokens, held, shares(tokens, held), 1, 1.1)
    assert skew_of(tokens, found) == 1.0
    assert int((found & ~held).sum()) == 2


def test_a_further_copy_replaces_one_to_spare_and_never_the_last():
    tokens = np.array([12.0, 1.0, 1.0, 1.0])
    held = np.array([[1, 0, 0], [0, 1, 1], [1, 1, 0], [0, 0, 1]], dtype=bool)
    found = adjusted(tokens, held, shares(tokens, held), 1, 1.6)
    assert found[0].sum() == 2
    assert found.any(axis=1).all()
    assert (found.sum(axis=0) == held.sum(axis=0)).all()
    assert skew_of(tokens, found) <= 1.6
    # With two copies to be kept of each, none can be spared.
    assert adjusted(tokens, held, shares(tokens, held), 2, 1.6) is None


@pytest.mark.parametrize("seed", range(20))
def test_adjusting_levels_what_it_returns(seed):
    chance = np.random.default_rng(seed)
    held = chance.random((12, 4)) < 0.4
    held[np.arange(12), chance.integers(0, 4, 12)] = True
    tokens = chance.exponential(size=12) ** 2
    found = adjusted(tokens, held, shares(tokens, held), 1, 1.15)
    if found is not None:
        assert skew_of(tokens, found) <= 1.15 + 1e-6
        assert found.any(axis=1).all()
        assert (found.sum(axis=0) == held.sum(axis=0)).all()


def test_mending_gives_the_gone_a_copy_first_then_fills_what_is_free():
    tokens = np.array([5.0, 1.0, 1.0, 1.0])
    held = np.array([[1, 1], [1, 1], [0, 0], [0, 0]], dtype=bool)
    found = mended(tokens, held, 2, 2)
    assert found.any(axis=1).all()
    assert (found.sum(axis=0) == 2).all()
    roomy = mended(tokens, held, 4, 1)
    assert roomy.all(), "every slot that is of use is used"
    three = mended(tokens, held, 3, 1)
    assert (three.sum(axis=0) == 3).all()
    assert three[0].all()


def test_only_ranks_that_hold_it_have_room():
    # Expert 0 lacks a second copy; the only free slot is beside its first one.
    held = np.array([[1, 0], [0, 1], [0, 1]], dtype=bool)
    found = mended(np.array([9.0, 1.0, 1.0]), held, 2, 2)
    assert found[0].all()
    assert found.any(axis=1).all()
    assert (found.sum(axis=0) <= 2).all()
