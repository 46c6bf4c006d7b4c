"""Which weights travel between which ranks so that a new placement can be served, and in which rounds. Pure.

Called by `expert_rebalancing.py` on every rank with the same arguments, hence with the same answer. Knows no tensors.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from penstock.workers.parallel.expert_placement import EMPTY, ExpertPlacement

Flags = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class ExpertMove:
    """One expert's weights, read by rank `source` (from a slot or its host copy) for a slot of rank `target`."""

    layer: int
    expert: int
    source: int
    target: int
    slot: int


def hosted_experts(num_experts: int, num_ranks: int, copies: int) -> Flags:
    """Which experts each rank should keep in host memory, of every layer: bool [E, R], `copies` ranks per expert.

    A last resort that a slot's loss does not touch (Lazarus 2024, section 5); neighbours in rank keep the copies, so
    that every rank keeps as many.
    """
    away = np.subtract.outer(-np.arange(num_experts), -np.arange(num_ranks)) % num_ranks
    hosted: Flags = away < copies
    return hosted


def suppliers(current: ExpertPlacement, members: tuple[int, ...], hosted_LER: Flags) -> Flags:
    """bool [L, E, R]: which members can hand out an expert; `hosted` [L, E, R] are those in host memory."""
    able: Flags = current.holders() | hosted_LER
    present = np.zeros(current.num_ranks, dtype=np.bool_)
    present[list(members)] = True
    return able & present


def plan_moves(
    current: ExpertPlacement, fresh: ExpertPlacement, members: tuple[int, ...], hosted_LER: Flags
) -> tuple[ExpertMove, ...]:
    """What each rank lacks for `fresh`, in order of layer, rank and slot; what nobody can supply is left out.

    A rank's own host copy comes first, then ranks with the expert in a slot, then others' host copies; among equals
    the one that was asked least.
    """
    holders = current.holders()
    able = suppliers(current, members, hosted_LER)
    asked = np.zeros(current.num_ranks, dtype=np.int64)
    moves = []
    for layer, target, slot in np.argwhere(_differs(current, fresh)).tolist():
        expert = int(fresh.slots[layer, target, slot])
        if able[layer, expert, target]:
            source = target
        else:
            options = np.flatnonzero(able[layer, expert])
            if not len(options):
                continue
            holding = options[holders[layer, expert, options]]
            options = holding if len(holding) else options
            source = int(options[asked[options].argmin()])
            asked[source] += 1
        moves.append(ExpertMove(layer, expert, source, target, slot))
    return tuple(moves)


def _differs(current: ExpertPlacement, fresh: ExpertPlacement) -> Flags:
    """[L, R, C] slots of `fresh` that hold an expert which is not there yet."""
    before = np.full(fresh.slots.shape, EMPTY, dtype=np.int32)
    width = current.slots.shape[2]  # which never shrinks
    before[:, :, :width] = current.slots[:, :, :width]
    differs: Flags = (fresh.slots != before) & (fresh.slots != EMPTY)
    return differs


def rounds(moves: tuple[ExpertMove, ...]) -> list[tuple[ExpertMove, ...]]:
    """The moves between different ranks, so that no rank sends or receives more than one expert in a round.

    What is in flight is bounded by that, whatever a plan asks. Within a round, moves are in order of their source.
    """
    planned: list[list[ExpertMove]] = []
    busy: list[set[tuple[str, int]]] = []
    for move in moves:
        if move.source == move.target:
            continue
        ends = {("from", move.source), ("to", move.target)}
        at = next((number for number, taken in enumerate(busy) if not ends & taken), len(planned))
        if at == len(planned):
            planned.append([])
            busy.append(set())
        planned[at].append(move)
        busy[at] |= ends
    return [tuple(sorted(each, key=lambda move: move.source)) for each in planned]
