"""Plans where experts go: at start, when load has drifted, and after ranks left or came.

Called by `expert_rebalancing.py` on the leading rank, in a thread beside the steps, and at start on every rank (where
the answer follows from numbers alone). Pure: placement, load and limits in; a placement out. A layer whose experts
are level enough under new shares keeps its slots, so that nothing is moved without need; where a layer is placed anew,
the plan's ranks are matched with the real ones so that fewest weights move (Lazarus 2024, section 4.3) and, among such
matches, choices of consecutive layers meet (ExFlow 2024).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from penstock.workers.errors import ConfigError
from penstock.workers.parallel.assignment import assign
from penstock.workers.parallel.expert_adjusting import adjusted, mended
from penstock.workers.parallel.expert_affinity import affine_placement, even_distance, stay_rate
from penstock.workers.parallel.expert_copies import bounded_copies, overlapping_spread, packed_spread
from penstock.workers.parallel.expert_load import LoadSnapshot, skew
from penstock.workers.parallel.expert_placement import (
    EMPTY,
    ExpertPlacement,
    cuts_from_shares,
    even_cuts,
    holders_of,
    level_shares,
)

F64 = NDArray[np.float64]
I32 = NDArray[np.int32]
Flags = NDArray[np.bool_]

WORTHWHILE = 0.98  # of a layer's skew: a new spread that is not better than this is not worth its moves
PRIOR = 1e-3  # of the mean load, added to every expert's: none is taken for never asked


@dataclass(frozen=True, slots=True)
class PlacementLimits:
    """What a placement may use and must keep."""

    slots_per_rank: int  # experts of one layer that a rank holds, copies included
    least_copies: int = 2  # of every expert, where slots and ranks allow
    most_skew: float = 1.1  # fullest rank over mean, of a layer; above it the layer is placed anew
    most_moves: int = 1024  # experts that one plan moves, or a layer more; the rest waits for the next
    least_gain: float = 0.1  # of the transitions that stay on their rank, for single copies to be placed by affinity
    affinity: float = 0.25  # worth of a layer's choices staying on their rank, beside 1 for its weights not moving


def first_placement(num_layers: int, num_experts: int, num_ranks: int, limits: PlacementLimits) -> ExpertPlacement:
    """Before any load is known: all experts alike. Raises ConfigError where not even one copy of each fits."""
    if num_ranks * limits.slots_per_rank < num_experts:
        raise ConfigError(
            f"{num_experts} experts do not fit {num_ranks} ranks with {limits.slots_per_rank} slots a layer: "
            f"{-(-num_experts // num_ranks)} slots on each would hold one copy of every expert",
            key="expert_parallel_size",
        )
    empty = np.full((1, num_ranks, limits.slots_per_rank), EMPTY, dtype=np.int32)
    cuts = np.zeros((1, num_experts, num_ranks + 1), dtype=np.int32)
    nothing = LoadSnapshot(np.zeros((1, num_experts)), np.zeros((0, num_experts, num_experts)), 0)
    layer = replan(ExpertPlacement(num_experts, empty, cuts), nothing, tuple(range(num_ranks)), limits)
    # Without load the layers are alike.
    return replace(layer, slots=layer.slots.repeat(num_layers, axis=0), cuts=layer.cuts.repeat(num_layers, axis=0))


def replan(
    current: ExpertPlacement,
    load: LoadSnapshot,
    members: tuple[int, ...],
    limits: PlacementLimits,
    available_LE: Flags | None = None,
) -> ExpertPlacement:
    """The placement over `members` (rank numbers, ascending) that this load asks for, of the same generation.

    Every expert that is `available` (default: all) gets a copy, if need be in more slots than the limits name: after a
    loss that beats refusing to serve. Slots are the current ones where levelling the shares was enough.
    """
    layout = _widened(current, members, limits)
    tokens = load.tokens + np.maximum(load.tokens.mean(axis=1, keepdims=True) * PRIOR, 1e-9)
    plan = _Replanning(tokens, load.transitions, members, limits, layout)
    for layer in plan.urgent_layers():
        if plan.moved >= limits.most_moves:
            break
        plan.place(layer)
    if available_LE is not None:
        lacking = ~np.take_along_axis(available_LE, layout.reshape(len(layout), -1).astype(np.int64), axis=1)
        layout[lacking.reshape(layout.shape)] = EMPTY
    holders = holders_of(layout, current.num_experts)
    # Without any load there is nothing to level: equal parts are exact, and the same wherever they are computed.
    cuts = cuts_from_shares(level_shares(tokens, holders), holders) if load.tokens.any() else even_cuts(holders)
    return replace(current, slots=layout, cuts=cuts)


def copies_wanted(num_experts: int, slots_per_rank: int, members: int, least: int) -> int:
    """Copies that every expert should have: `least`, or what ranks and slots allow; 1 at least."""
    return max(1, min(least, members, members * slots_per_rank // num_experts))


def _widened(current: ExpertPlacement, members: tuple[int, ...], limits: PlacementLimits) -> I32:
    """The members' slots, as many as the limits or the number of experts ask for; the others' are empty."""
    now = current.slots.shape[2]
    slots = max(limits.slots_per_rank, -(-current.num_experts // len(members)), now)
    layout = np.full((*current.slots.shape[:2], slots), EMPTY, dtype=np.int32)
    layout[:, list(members), :now] = current.slots[:, list(members)]
    return layout


class _Replanning:
    """One plan under way: `layout` [L, R, C] changes, layer by layer."""

    def __init__(
        self, tokens: F64, transitions: F64, members: tuple[int, ...], limits: PlacementLimits, layout: I32
    ) -> None:
        self._tokens, self._transitions = tokens, transitions
        self._members, self._limits, self._layout = members, limits, layout
        experts = tokens.shape[1]
        self._slots = max(limits.slots_per_rank, -(-experts // len(members)))
        self._least = copies_wanted(experts, self._slots, len(members), limits.least_copies)
        self._held: Flags = holders_of(layout, experts)[:, :, list(members)]
        self._shares = level_shares(tokens, self._held)
        self._skew = [skew(_load(*pair)[None]) for pair in zip(tokens, self._shares, strict=True)]
        self._short = (self._held.sum(axis=2) < self._least).any(axis=1)
        self._affine = _affine_spread(transitions, tokens, self._held, limits)
        self.moved = 0

    def urgent_layers(self) -> list[int]:
        """Those to be placed anew: first where most experts have no copy, then too few, then the most uneven."""
        if self._affine is not None:
            return np.flatnonzero((self._affine != self._held).any(axis=(1, 2))).tolist()
        most = self._limits.most_skew
        bad = [layer for layer, skewed in enumerate(self._skew) if self._short[layer] or skewed > most]
        gone = (~self._held.any(axis=2)).sum(axis=1)
        return sorted(bad, key=lambda layer: (-gone[layer], not self._short[layer], -self._skew[layer]))

    def place(self, layer: int) -> None:
        """By affinity; else few changes; else a new spread, if it is more level, on the ranks that hold most of it."""
        if self._affine is not None:
            self._arrange(layer, self._affine[layer])
            return
        tokens, held, share = self._tokens[layer], self._held[layer], self._shares[layer]
        evenness = self._skew[layer]
        if self._short[layer]:
            held = mended(tokens, held, self._slots, self._least)
            share = level_shares(tokens[None], held[None])[0]
            evenness = skew(_load(tokens, share)[None])
        # What is empty is not mended, nor is what mending left short.
        usable = bool(self._held[layer].any() and (held.sum(axis=1) >= self._least).all())
        near = adjusted(tokens, held, share, self._least, self._limits.most_skew) if usable else None
        if near is not None:
            self._arrange(layer, near)
            return
        ranks = len(self._members)
        fresh = _spread(tokens, ranks, self._slots, self._limits)
        if usable and _levelled(tokens, fresh) > evenness * WORTHWHILE:
            self._arrange(layer, held)
            return
        own = self._held[layer]
        wish = _meeting(layer, self._layout, self._transitions, fresh, self._members) * self._limits.affinity
        match = assign(-(_kept(fresh, own) + wish), np.ones(ranks, dtype=np.int64))
        self._arrange(layer, fresh[:, np.argsort(match)])

    def _arrange(self, layer: int, wanted_ER: Flags) -> None:
        """Put these experts into the ranks' slots: those there stay where they are."""
        for column, member in enumerate(self._members):
            slots = self._layout[layer, member]
            experts = np.flatnonzero(wanted_ER[:, column]).astype(np.int32)
            slots[~np.isin(slots, experts)] = EMPTY
            missing = experts[~np.isin(experts, slots)]
            slots[np.flatnonzero(slots == EMPTY)[: len(missing)]] = missing
            self.moved += len(missing)


def _load(tokens_E: F64, shares_ER: F64) -> F64:
    load: F64 = tokens_E @ shares_ER
    return load


def _levelled(tokens_E: F64, held_ER: Flags) -> float:
    shares = level_shares(tokens_E[None], held_ER[None])[0]
    return skew(_load(tokens_E, shares)[None])


def _spread(tokens_E: F64, ranks: int, slots: int, limits: PlacementLimits) -> Flags:
    """Maximum overlap where it is level enough: it survives most losses; else whichever is more level."""
    copies = bounded_copies(tokens_E, ranks * slots, limits.least_copies, ranks)
    packed = packed_spread(tokens_E, copies, ranks, slots)
    overlapping = overlapping_spread(copies, ranks, slots)
    least = copies_wanted(len(tokens_E), slots, ranks, limits.least_copies)
    if (overlapping.sum(axis=1) < least).any():
        # Blocks that do not divide the ranks leave the last group fewer than its members have copies.
        return packed
    if _levelled(tokens_E, overlapping) <= limits.most_skew:
        return overlapping
    return min(packed, overlapping, key=lambda held: _levelled(tokens_E, held))


def _affine_spread(transitions: F64, tokens_LE: F64, held_LER: Flags, limits: PlacementLimits) -> Flags | None:
    """[L, E, R] by affinity, where every expert has one copy, transitions were traced, and they would stay more often.

    The plan's ranks are matched with the real ones for all layers together: anything else would part what belongs
    together.
    """
    layers, experts, ranks = held_LER.shape
    single = limits.slots_per_rank * ranks == experts and limits.least_copies == 1
    if not single or len(transitions) != layers - 1 or not transitions.any():
        return None
    rank_of = affine_placement(transitions, tokens_LE, even_distance(ranks), limits.most_skew)
    whole = bool((held_LER.sum(axis=2) == 1).all())
    if whole and stay_rate(transitions, rank_of) < stay_rate(transitions, held_LER.argmax(axis=2)) + limits.least_gain:
        return None
    fresh = np.eye(ranks, dtype=np.bool_)[rank_of]
    kept = sum(_kept(one, other) for one, other in zip(fresh, held_LER, strict=True))
    match = assign(-np.asarray(kept), np.ones(ranks, dtype=np.int64))
    return fresh[:, :, np.argsort(match)]


def _kept(fresh_EP: Flags, held_ER: Flags) -> F64:
    """[P, R] which part of the experts of plan rank p real rank r holds already."""
    common: F64 = fresh_EP.T.astype(np.float64) @ held_ER.astype(np.float64)
    return common / max(1.0, float(fresh_EP.sum(axis=0).max()))


def _meeting(layer: int, layout_LRC: I32, transitions: F64, fresh_EP: Flags, members: tuple[int, ...]) -> F64:
    """[P, R] which part of the layer's transitions plan rank p would keep on real rank r, given the layers beside."""
    ranks = len(members)
    if len(transitions) != len(layout_LRC) - 1:
        return np.zeros((ranks, ranks))
    wish, total = np.zeros((ranks, ranks)), 0.0
    sides = [(layer - 1, transitions[layer - 1].T)] if layer > 0 else []
    sides += [(layer + 1, transitions[layer])] if layer + 1 < len(layout_LRC) else []
    for beside, weights_here_there in sides:
        held = holders_of(layout_LRC[beside : beside + 1], len(fresh_EP))[0][:, list(members)].astype(np.float64)
        held /= np.maximum(held.sum(axis=1, keepdims=True), 1.0)
        here = fresh_EP / np.maximum(fresh_EP.sum(axis=1, keepdims=True), 1)
        wish += here.T @ weights_here_there @ held
        total += float(weights_here_there.sum())
    return wish / total if total > 0 else wish
