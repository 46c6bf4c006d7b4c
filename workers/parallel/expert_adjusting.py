"""Mends and levels one layer's placement by as few changes as it takes, starting from what ranks hold. Pure numpy.

Called by `expert_planner.py` before it plans a layer anew: weights that stay need not travel. Mending gives experts the
copies they lack. Each change of levelling relieves the fullest rank, either by a further copy of one of its experts on
another rank, in place of an expert that has copies to spare, or by a swap.

Legend: E experts, R ranks. `held` is bool [E, R]; `flow` [E, R] the tokens of each expert that each rank computes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from penstock.workers.parallel.expert_copies import place_copy
from penstock.workers.parallel.expert_placement import pour

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class _Change:
    height: float  # of the fullest rank concerned, afterwards
    other: int  # rank beside the fullest
    given: int  # expert that the other rank gets
    taken: int  # expert that it loses
    swapped: bool  # whether the fullest rank gets `taken` for it


def mended(tokens_E: F64, held_ER: Flags, slots: int, least_copies: int) -> Flags:
    """With `least_copies` of every expert as far as slots allow, those without any copy first, then the most asked.

    A copy goes to the least loaded rank with a free slot, else in place of an expert with copies to spare. Slots that
    are free then take copies of whatever carries most.
    """
    held, ranks = held_ER.copy(), held_ER.shape[1]
    for goal in sorted({1, least_copies}):
        for expert in np.argsort(-tokens_E, kind="stable").tolist():
            while int(held[expert].sum()) < goal and _add(expert, tokens_E, held, slots, goal):
                pass
    for _ in range(ranks * slots - int(held.sum())):
        copies = held.sum(axis=1)
        most = int(np.where(copies < ranks, tokens_E / np.maximum(copies, 1), -1.0).argmax())
        if copies[most] == ranks:
            break
        _add(most, tokens_E, held, slots, least_copies)
    return held


def _add(expert: int, tokens: F64, held: Flags, slots: int, goal: int) -> bool:
    """One more copy, if others with more than `goal` copies, or free slots, allow."""
    copies = held.sum(axis=1)
    carried = tokens / np.maximum(copies, 1)
    if int(held.sum()) < held.shape[1] * slots:
        place_copy(expert, held, slots, carried @ held, carried)
        return True
    spare = held & (copies > goal)[:, None] & ~held[expert][None, :]
    if not spare.any():
        return False
    # What goes is what adds least to its other copies.
    price = np.where(spare, (carried / np.maximum(copies, 1))[:, None], np.inf)
    victim, rank = divmod(int(price.argmin()), held.shape[1])
    held[victim, rank], held[expert, rank] = False, True
    return True


def adjusted(tokens_E: F64, held_ER: Flags, share_ER: F64, least_copies: int, most_skew: float) -> Flags | None:
    """What ranks should hold, or None where these changes do not lead to `most_skew` (fullest rank over mean).

    `share` is what part of each expert's tokens each copy computes, as levelled. Every rank keeps its number of
    experts, and no expert falls below `least_copies` that had them.
    """
    held = held_ER.copy()
    flow = tokens_E[:, None] * share_ER
    goal = most_skew * float(tokens_E.sum()) / held.shape[1]
    for _ in range(2 * len(tokens_E)):
        load = flow.sum(axis=0)
        full = int(load.argmax())
        if load[full] <= goal:
            return held
        change = _best(full, load, flow, held, least_copies)
        if change is None or change.height >= load[full] * (1 - 1e-6):
            return None
        _apply(change, full, held, flow, tokens_E)
    return None


def _best(full: int, load: F64, flow: F64, held: Flags, least: int) -> _Change | None:
    found: _Change | None = None
    copies = held.sum(axis=1)
    for other in range(held.shape[1]):
        given = np.flatnonzero(held[:, full] & ~held[:, other])
        taken = np.flatnonzero(held[:, other] & ~held[:, full])
        if not len(given) or not len(taken):
            continue
        for heights, swapped in (
            (_copied(full, other, given, taken, load, flow, held, copies > least), False),
            (_swapped(full, other, given, taken, load, flow), True),
        ):
            at = int(heights.argmin())
            # Strictly lower only: a copy moves one expert, a swap two.
            if np.isfinite(heights.flat[at]) and (found is None or heights.flat[at] < found.height * (1 - 1e-9)):
                one, two = divmod(at, len(taken))
                found = _Change(float(heights.flat[at]), other, int(given[one]), int(taken[two]), swapped)
    return found


def _swapped(full: int, other: int, given: I64, taken: I64, load: F64, flow: F64) -> F64:
    """Height [given, taken] of the fuller of the two ranks after each swap."""
    gain = flow[given, full][:, None] - flow[taken, other][None, :]
    heights: F64 = np.maximum(load[full] - gain, load[other] + gain)
    return heights


def _copied(full: int, other: int, given: I64, taken: I64, load: F64, flow: F64, held: Flags, spare: Flags) -> F64:
    """Height [given, taken] of the fullest rank concerned when `other` holds `given` in place of `taken`."""
    lost = flow[taken, other]
    # Who else holds the expert that goes takes over its tokens in equal parts.
    others = held[taken].copy()
    others[:, other] = False
    rise = lost / np.maximum(others.sum(axis=1), 1)
    highest = np.where(others, load[None, :] + rise[:, None], 0.0).max(axis=1)
    room = np.maximum((load[full] - load[other] + lost) / 2, 0.0)
    moved = np.minimum(flow[given, full][:, None], room[None, :])
    height = np.maximum(load[full] - moved, load[other] - lost[None, :] + moved)
    return np.where(spare[taken][None, :], np.maximum(height, highest[None, :]), np.inf)


def _apply(change: _Change, full: int, held: Flags, flow: F64, tokens: F64) -> None:
    given, taken, other = change.given, change.taken, change.other
    held[given, other], held[taken, other] = True, False
    if change.swapped:
        held[given, full], held[taken, full] = False, True
        flow[given, other], flow[given, full] = flow[given, full], 0.0
        flow[taken, full], flow[taken, other] = flow[taken, other], 0.0
        return
    # Tokens of both experts flow to where they now have room.
    for expert in (taken, given, taken):
        rest = flow.sum(axis=0) - flow[expert]
        flow[expert] = pour(rest[None], held[expert][None], tokens[expert : expert + 1])[0]
