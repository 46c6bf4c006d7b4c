"""Counts and spreads of copies: the method's own check values, survival counted by hand, and what must always hold."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.workers.errors import ConfigError
from penstock.workers.parallel.expert_copies import (
    bounded_copies,
    overlapping_spread,
    packed_spread,
    proportional_copies,
)


def test_counts_of_the_published_example():
    assert proportional_copies(np.array([10.0, 20.0, 70.0, 300.0]), 16, 2).tolist() == [2, 2, 2, 10]
    assert proportional_copies(np.array([300.0, 10.0, 70.0, 20.0]), 16, 2).tolist() == [10, 2, 2, 2]


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=12), st.integers(1, 3), st.integers(0, 20))
@settings(max_examples=100, deadline=None)
def test_counts_add_up_keep_the_floor_and_follow_the_load(tokens, least, more):
    loads = np.array(tokens, dtype=float)
    total = len(tokens) * least + more
    copies = proportional_copies(loads, total, least)
    assert int(copies.sum()) == total
    assert copies.min() >= least
    if loads.any():
        assert (np.diff(copies[np.argsort(loads, kind="stable")]) >= 0).all()


def test_too_few_slots_for_the_floor():
    with pytest.raises(ConfigError, match="3 experts with 2 copies each need 6 slots a layer; there are 5"):
        proportional_copies(np.ones(3), 5, 2)


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=12), st.integers(1, 5), st.integers(1, 6), st.integers(1, 3))
@settings(max_examples=100, deadline=None)
def test_spreads_use_each_rank_within_its_slots_and_hold_every_expert(tokens, ranks, slots, least):
    loads = np.array(tokens, dtype=float)
    if ranks * slots < len(tokens):
        return
    copies = bounded_copies(loads, ranks * slots, least, ranks)
    assert copies.max() <= ranks
    assert int(copies.sum()) == min(ranks * slots, len(tokens) * ranks)
    packed, overlapping = packed_spread(loads, copies, ranks, slots), overlapping_spread(copies, ranks, slots)
    assert (packed.sum(axis=1) == copies).all()
    for held in (packed, overlapping):
        assert (held.sum(axis=0) <= slots).all()
        assert held.any(axis=1).all()


def survivals(held, alive):
    choices = list(itertools.combinations(range(held.shape[1]), alive))
    return sum(bool(held[:, list(choice)].any(axis=1).all()) for choice in choices)


def best_survivals(copies, ranks, slots, alive):
    """Of all placements with these counts, by trying them."""
    rows = [list(itertools.combinations(range(ranks), count)) for count in copies]
    best = 0
    for choice in itertools.product(*rows):
        held = np.zeros((len(copies), ranks), dtype=bool)
        for expert, holders in enumerate(choice):
            held[expert, list(holders)] = True
        if (held.sum(axis=0) <= slots).all():
            best = max(best, survivals(held, alive))
    return best


@pytest.mark.parametrize(("copies", "two", "three"), [((2, 2, 3, 3), 6, 9), ((1, 2, 3, 4), 3, 6), ((2, 2, 2, 4), 4, 8)])
def test_overlap_survives_as_often_as_any_placement_can(copies, two, three):
    held = overlapping_spread(np.array(copies), 5, 2)
    # The published optimum; a slot that a count cannot use holds one copy more of another expert, which is better.
    assert survivals(held, 2) >= two
    assert survivals(held, 3) >= three
    assert survivals(held, 2) >= best_survivals(copies, 5, 2, 2)


@pytest.mark.parametrize("seed", range(10))
def test_packing_is_near_the_best_division(seed):
    chance = np.random.default_rng(seed)
    loads = chance.exponential(size=9) + 0.01
    held = packed_spread(loads, np.ones(9, dtype=np.int64), 3, 3)
    best = min(
        max(
            loads[list(one)].sum(),
            loads[list(two)].sum(),
            loads.sum() - loads[list(one)].sum() - loads[list(two)].sum(),
        )
        for one in itertools.combinations(range(9), 3)
        for two in itertools.combinations(sorted(set(range(9)) - set(one)), 3)
    )
    assert (loads @ held).max() <= (4 / 3 - 1 / 9) * best
