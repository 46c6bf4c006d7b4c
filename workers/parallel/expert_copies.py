"""How many copies of each expert a group holds, and two ways to spread them over ranks. One layer at a time; pure.

Called by `expert_planner.py`. The counts and the spread of most overlap are those of Lazarus (2024, section 4): counts
follow popularity with a floor, and ranks that hold experts of like popularity hold the same ones, so that chance losses
spare every expert most often. The packed spread instead puts copies, largest first, on the least loaded rank (Graham
1969), as the load balancers of served mixtures do: it levels load where slots are too few for popularity to be met.

Legend: E experts, R ranks, C slots of a rank. Sets of experts per rank are bool [E, R]; a rank holds no expert twice.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from penstock.workers.errors import ConfigError

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
Flags = NDArray[np.bool_]


def proportional_copies(tokens_E: F64, total: int, least: int) -> I64:
    """Lazarus' counts: in order of load, max(floor(own share of what is left), least); they add up to `total`.

    `least` copies make any `least` - 1 losses survivable. Without load all are alike. Raises ConfigError where even
    `least` of each do not fit.
    """
    experts = len(tokens_E)
    if least < 1 or experts * least > total:
        raise ConfigError(
            f"{experts} experts with {least} copies each need {experts * least} slots a layer; there are {total}",
            key="expert_parallel_size",
        )
    tokens = tokens_E if tokens_E.sum() > 0 else np.ones(experts)
    order = np.argsort(tokens, kind="stable")
    left_tokens = np.cumsum(tokens[order][::-1])[::-1]
    copies: I64 = np.zeros(experts, dtype=np.int64)
    left = total
    for place, expert in enumerate(order.tolist()):
        # The last one's share is all that is left, whatever rounding says.
        share = 1.0 if place == experts - 1 else tokens[expert] / max(left_tokens[place], 1e-300)
        copies[expert] = max(int(share * left + 1e-9), least)
        left -= int(copies[expert])
    return copies


def bounded_copies(tokens_E: F64, total: int, least: int, most: int) -> I64:
    """`proportional_copies` with at most `most` (the ranks) of each; what that frees goes where a copy carries most.

    `least` is lowered to what fits, to 1 at least; the sum is at most `total`.
    """
    experts = len(tokens_E)
    least = max(1, min(least, most, total // experts if experts else 1))
    copies = np.minimum(proportional_copies(tokens_E, total, least), most)
    for _ in range(min(total, experts * most) - int(copies.sum())):
        carried = np.where(copies < most, tokens_E / copies, -1.0)
        copies[int(carried.argmax())] += 1
    return copies


def overlapping_spread(copies_E: I64, ranks: int, slots: int) -> Flags:
    """Lazarus' spread of maximum rank overlap, bool [E, R].

    Experts in order of their counts form groups of C; a group gets a block of ranks of its own, as many as its rarest
    member has copies (the last group what remains), which hold the whole group; further copies fill slots evenly.
    """
    order = np.argsort(copies_E, kind="stable")
    held: Flags = np.zeros((len(copies_E), ranks), dtype=np.bool_)
    first = 0
    for start in range(0, len(order), slots):
        group = order[start : start + slots]
        last = start + slots >= len(order)
        block = ranks - first if last else min(int(copies_E[group[0]]), ranks - first)
        for expert in group.tolist():
            held[expert, first : first + min(block, int(copies_E[expert]))] = True
        first += block
    _fill_evenly(held, copies_E, slots)
    return held


def _fill_evenly(held_ER: Flags, copies_E: I64, slots: int) -> None:
    """Further copies go where there is room, emptiest rank first; none is moved out of its block for another's sake.

    Slots that the counts leave over, since a second copy on one rank is of no use, take the most copied expert that
    their rank lacks: a copy more than asked never hurts.
    """
    for expert in np.argsort(held_ER.sum(axis=1) - copies_E, kind="stable").tolist():
        for _ in range(int(copies_E[expert] - held_ER[expert].sum())):
            able = (held_ER.sum(axis=0) < slots) & ~held_ER[expert]
            if not able.any():
                break
            held_ER[expert, int(np.where(able, held_ER.sum(axis=0), slots).argmin())] = True
    for rank in range(held_ER.shape[1]):
        while int(held_ER[:, rank].sum()) < min(slots, len(copies_E)):
            last_first = np.where(held_ER[:, rank], -1, copies_E)[::-1]
            held_ER[len(copies_E) - 1 - int(last_first.argmax()), rank] = True


def packed_spread(tokens_E: F64, copies_E: I64, ranks: int, slots: int) -> Flags:
    """Copies, those with most tokens first, each to the least loaded rank that has room, bool [E, R]; then swaps."""
    carried = tokens_E / np.maximum(copies_E, 1)
    held: Flags = np.zeros((len(tokens_E), ranks), dtype=np.bool_)
    load = np.zeros(ranks)
    for expert in np.argsort(-carried, kind="stable").tolist():
        for _ in range(min(int(copies_E[expert]), ranks)):
            place_copy(expert, held, slots, load, carried)
    _swap_down(held, load, carried)
    return held


def place_copy(expert: int, held_ER: Flags, slots: int, load_R: F64, carried_E: F64) -> None:
    """Give one more rank this expert, the least loaded with room; `held` and `load` change.

    There must be a free slot, and a rank without the expert. `carried` is what one copy of each expert computes.
    """
    room = held_ER.sum(axis=0) < slots
    lacking = ~held_ER[expert]
    if (room & lacking).any():
        rank = int(np.where(room & lacking, load_R, np.inf).argmin())
    else:
        # Only ranks that hold it already have room: one that lacks it gives one of its own experts to such a rank.
        # It has more experts than the rank with room, hence one that the other lacks.
        taker = int(np.where(room, load_R, np.inf).argmin())
        rank = int(np.where(lacking, load_R, np.inf).argmin())
        given = int(np.where(held_ER[:, rank] & ~held_ER[:, taker], carried_E, np.inf).argmin())
        held_ER[given, rank], held_ER[given, taker] = False, True
        load_R[rank] -= carried_E[given]
        load_R[taker] += carried_E[given]
    held_ER[expert, rank] = True
    load_R[rank] += carried_E[expert]


def _swap_down(held_ER: Flags, load_R: F64, carried_E: F64) -> None:
    """Swap pairs between the fullest rank and another while that makes the fuller of the two emptier."""
    for _ in range(4 * len(load_R)):
        full = int(load_R.argmax())
        height, swap = float(load_R[full]) * (1 - 1e-9), (full, 0, 0)
        for other in range(len(load_R)):
            mine = np.flatnonzero(held_ER[:, full] & ~held_ER[:, other])
            theirs = np.flatnonzero(held_ER[:, other] & ~held_ER[:, full])
            if not len(mine) or not len(theirs):
                continue
            gains = carried_E[mine][:, None] - carried_E[theirs][None, :]
            heights = np.maximum(load_R[full] - gains, load_R[other] + gains)
            one, two = divmod(int(heights.argmin()), len(theirs))
            if heights[one, two] < height:
                height, swap = float(heights[one, two]), (other, int(mine[one]), int(theirs[two]))
        other, given, taken = swap
        if other == full:
            return
        held_ER[given, full], held_ER[given, other] = False, True
        held_ER[taken, other], held_ER[taken, full] = False, True
        gain = float(carried_E[given] - carried_E[taken])
        load_R[full] -= gain
        load_R[other] += gain
