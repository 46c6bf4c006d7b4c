"""Affinity: planted chains are found again, small cases against every placement, and chance gains nothing."""

import itertools

import numpy as np
import pytest

from penstock.workers.parallel.expert_affinity import affine_placement, even_distance, hop_cost, stay_rate, sweep

EXPERTS, RANKS, LAYERS = 16, 4, 6


def trace(chance, follow, tokens=6000):
    """Experts [tokens, layers]: with probability `follow` a token goes where a hidden permutation sends it."""
    hidden = [np.random.default_rng(layer).permutation(EXPERTS) for layer in range(LAYERS)]
    routes = chance.integers(0, EXPERTS, (tokens, LAYERS))
    for layer in range(1, LAYERS):
        led = chance.random(tokens) < follow
        routes[led, layer] = hidden[layer][routes[led, layer - 1]]
    return routes


def transitions(routes):
    counts = np.zeros((LAYERS - 1, EXPERTS, EXPERTS))
    for layer in range(LAYERS - 1):
        np.add.at(counts[layer], (routes[:, layer], routes[:, layer + 1]), 1)
    return counts


def test_a_planted_chain_is_found_again():
    chance = np.random.default_rng(0)
    routes = trace(chance, 0.7)
    tokens = np.stack([np.bincount(routes[:, layer], minlength=EXPERTS) for layer in range(LAYERS)]).astype(float)
    found = affine_placement(transitions(routes), tokens, even_distance(RANKS))
    assert all((np.bincount(row, minlength=RANKS) == EXPERTS // RANKS).all() for row in found)
    planted = 0.7 + 0.3 / RANKS
    assert stay_rate(transitions(trace(chance, 0.7)), found) >= 0.95 * planted


def test_chance_routes_gain_nothing_on_other_tokens():
    chance = np.random.default_rng(1)
    found = affine_placement(transitions(trace(chance, 0.0)), np.ones((LAYERS, EXPERTS)), even_distance(RANKS))
    assert stay_rate(transitions(trace(chance, 0.0)), found) == pytest.approx(1 / RANKS, abs=0.02)


@pytest.mark.parametrize("seed", range(12))
def test_small_cases_are_as_good_as_any_placement(seed):
    weights = np.random.default_rng(seed).random((2, 4, 4)) ** 3
    halves = [row for row in itertools.product(range(2), repeat=4) if sum(row) == 2]
    distance = even_distance(2)
    best = min(hop_cost(weights, np.array(choice), distance) for choice in itertools.product(halves, repeat=3))
    found = affine_placement(weights, np.ones((3, 4)), distance, most_skew=9.0)
    assert hop_cost(weights, found, distance) == pytest.approx(best)


def test_sweeps_never_cost_more_and_keep_capacity():
    chance = np.random.default_rng(2)
    weights, distance = chance.random((4, 6, 6)), even_distance(3) * chance.integers(1, 3, (3, 3))
    start = np.stack([chance.permutation(np.repeat(np.arange(3), 2)) for _ in range(5)])
    swept = sweep(start, weights, distance, np.full(3, 2))
    assert hop_cost(weights, swept, distance) <= hop_cost(weights, start, distance)
    assert all((np.bincount(row) == 2).all() for row in swept)


def test_a_rank_that_would_be_too_full_gives_experts_away():
    # Affinity wants the two hot experts of both layers together; balance does not.
    weights = np.diag([9.0, 8.0, 1.0, 1.0])[None] + np.array([[[0, 9, 0, 0], [9, 0, 0, 0], [0] * 4, [0] * 4]])
    tokens = np.tile([10.0, 10.0, 1.0, 1.0], (2, 1))
    found = affine_placement(weights, tokens, even_distance(2), most_skew=1.1)
    for row in found:
        assert np.bincount(row, tokens[0]).max() == 11.0


def test_no_transitions_all_stay():
    assert stay_rate(np.zeros((1, 2, 2)), np.zeros((2, 2), dtype=np.int64)) == 1.0
