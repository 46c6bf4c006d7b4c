"""Single-copy placement that keeps consecutive layers' choices on one rank (ExFlow 2024, sections 4.2 and 4.3).

Called by `expert_planner.py` where every expert has one copy, and by reports on how far tokens travel. Pure numpy. In
place of the paper's integer program: a greedy pass from every layer outwards, then sweeps that solve each layer's
assignment exactly given its neighbours, then swaps where a rank is too full.

Legend: L layers, E experts, R ranks. `rank_of` [L, E] is the rank of each expert; `transitions` [L - 1, E, E] how much
expert b of layer l + 1 follows a of layer l; `distance` [R, R] the cost of a hop (0 on the diagonal; farther = more).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from penstock.workers.parallel.assignment import assign
from penstock.workers.parallel.expert_copies import packed_spread

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]

MOST_SWEEPS = 16
MOST_STARTS = 8  # layers from which the greedy pass begins, in small models
SHUFFLES = 24  # further starts there, at random
SMALL = 512  # layers times experts; larger ones have one start, since each takes seconds
LEAST_GAIN = 1e-3  # of the cost, for another round of sweeps


def hop_cost(transitions: F64, rank_of_LE: I64, distance_RR: F64) -> float:
    """Sum over transitions of the distance between their experts' ranks."""
    return float(
        sum(
            (weights * distance_RR[before][:, after]).sum()
            for weights, before, after in zip(transitions, rank_of_LE[:-1], rank_of_LE[1:], strict=True)
        )
    )


def stay_rate(transitions: F64, rank_of_LE: I64) -> float:
    """Part of the transitions that stay on their rank; 1 where there are none."""
    total = float(transitions.sum())
    ranks = int(rank_of_LE.max(initial=0)) + 1
    return 1.0 - hop_cost(transitions, rank_of_LE, 1.0 - np.eye(ranks)) / total if total > 0 else 1.0


def even_distance(ranks: int) -> F64:
    """Every hop between ranks costs 1."""
    return 1.0 - np.eye(ranks)


def affine_placement(transitions: F64, tokens_LE: F64, distance_RR: F64, most_skew: float = 1.1) -> I64:
    """Ranks int64 [L, E] of least hop cost found, with at most ceil(E / R) experts of a layer on a rank.

    A layer's fullest rank has at most `most_skew` times what balance alone would give it, where swaps can bring that
    about.
    """
    layers, experts = tokens_LE.shape
    ranks = len(distance_RR)
    capacity = np.full(ranks, -(-experts // ranks), dtype=np.int64)
    balanced = np.stack([_packed(tokens, capacity) for tokens in tokens_LE])
    best = balanced
    for start in _starts(transitions, balanced, distance_RR, capacity):
        found = sweep(start, transitions, distance_RR, capacity)
        if hop_cost(transitions, found, distance_RR) < hop_cost(transitions, best, distance_RR):
            best = found
    for layer in range(layers):
        limit = most_skew * float(np.bincount(balanced[layer], tokens_LE[layer], ranks).max())
        _lower(layer, best, _layer_cost(layer, best, transitions, distance_RR), tokens_LE[layer], limit)
    return best


def _starts(transitions: F64, balanced: I64, distance: F64, capacity: I64) -> Iterator[I64]:
    layers, experts = balanced.shape
    small = layers * experts <= SMALL
    count = min(layers, MOST_STARTS) if small else 1
    for start in np.unique(np.linspace(0, layers - 1, count).astype(int)).tolist():
        yield _outwards(start, transitions, balanced, distance, capacity)
    chance = np.random.default_rng(0)
    for _ in range(SHUFFLES if small else 0):
        yield np.stack([row[chance.permutation(experts)] for row in balanced])


def sweep(rank_of_LE: I64, transitions: F64, distance_RR: F64, capacity_R: I64) -> I64:
    """Solve layer after layer given its neighbours until no layer gains; the cost never rises."""
    found = rank_of_LE.copy()
    experts = np.arange(found.shape[1])
    for _ in range(MOST_SWEEPS):
        gained = 0.0
        for layer in range(len(found)):
            cost = _layer_cost(layer, found, transitions, distance_RR)
            fresh = assign(cost, capacity_R)
            old_cost, new_cost = cost[experts, found[layer]].sum(), cost[experts, fresh].sum()
            if new_cost < old_cost - 1e-9 * max(1.0, abs(old_cost)):
                found[layer] = fresh
                gained += old_cost - new_cost
        if gained <= LEAST_GAIN * hop_cost(transitions, found, distance_RR):
            break
    return found


def _packed(tokens_E: F64, capacity_R: I64) -> I64:
    held = packed_spread(tokens_E, np.ones(len(tokens_E), dtype=np.int64), len(capacity_R), int(capacity_R[0]))
    ranks: I64 = held.argmax(axis=1)
    return ranks


def _outwards(start: int, transitions: F64, balanced: I64, distance: F64, capacity: I64) -> I64:
    """Layer `start` as balanced, every other given only its neighbour on the side of `start`."""
    found = balanced.copy()
    for layer in range(start + 1, len(found)):
        found[layer] = assign(transitions[layer - 1].T @ distance[found[layer - 1]], capacity)
    for layer in range(start - 1, -1, -1):
        found[layer] = assign(transitions[layer] @ distance[found[layer + 1]], capacity)
    return found


def _layer_cost(layer: int, rank_of_LE: I64, transitions: F64, distance: F64) -> F64:
    """[E, R] what the hops into and out of each expert of this layer cost on each rank."""
    cost = np.zeros((rank_of_LE.shape[1], len(distance)))
    if layer > 0:
        cost += transitions[layer - 1].T @ distance[rank_of_LE[layer - 1]]
    if layer + 1 < len(rank_of_LE):
        cost += transitions[layer] @ distance[rank_of_LE[layer + 1]].astype(np.float64)
    return cost


def _lower(layer: int, rank_of_LE: I64, cost_ER: F64, tokens_E: F64, limit: float) -> None:
    """Swap experts out of the fullest rank, those first that cost least hops, until it is within `limit`."""
    own = rank_of_LE[layer]
    ranks = cost_ER.shape[1]
    for _ in range(4 * len(own)):
        load = np.bincount(own, tokens_E, ranks)
        full = int(load.argmax())
        if load[full] <= limit:
            return
        mine, theirs = np.flatnonzero(own == full), np.flatnonzero(own != full)
        gain = tokens_E[mine][:, None] - tokens_E[theirs][None, :]
        fits = (gain > 0) & (load[own[theirs]][None, :] + gain < load[full])
        leave = cost_ER[mine][:, own[theirs]] - cost_ER[mine, full][:, None]
        come = cost_ER[theirs, full] - cost_ER[theirs, own[theirs]]
        price = np.where(fits, leave + come[None, :], np.inf)
        if not np.isfinite(price).any():
            return
        given, taken = divmod(int(price.argmin()), len(theirs))
        own[mine[given]], own[theirs[taken]] = own[theirs[taken]], full
