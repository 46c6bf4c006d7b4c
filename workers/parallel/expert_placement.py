"""Where the experts of a model are: which expert lies in which slot of which rank, and what share of its tokens each
copy gets.

Made by `expert_planner.py` on one rank and sent to the others as plain integers; read by dispatch, by the weights'
slots and by failover. Pure numpy; knows no tensors and no processes. Shares are cuts in fixed point, so that ranks
with different arithmetic units split tokens alike.

Legend: L layers with experts, E experts, R ranks of the whole group (dead ones included), C slots of a rank and layer.
Invariants of an `ExpertPlacement`: a rank holds no expert of a layer twice; a copy that gets tokens exists; the shares
of an expert that has a copy add up to `WHOLE`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from penstock.workers.errors import IntegrityError

I32 = NDArray[np.int32]
F64 = NDArray[np.float64]
Flags = NDArray[np.bool_]

WHOLE = 1 << 20  # an expert's tokens, in the unit of shares
EMPTY = -1  # a slot without expert


@dataclass(frozen=True, slots=True, eq=False)
class ExpertPlacement:
    """One generation of it. Ranks that are gone keep their (empty) rows, so that ranks keep their numbers."""

    num_experts: int
    slots: I32  # [L, R, C] expert in each slot, or EMPTY
    cuts: I32  # [L, E, R + 1] rank r gets the part of an expert's tokens from cuts[.., r] to cuts[.., r + 1]
    generation: int = 0

    @property
    def num_layers(self) -> int:
        """L."""
        return int(self.slots.shape[0])

    @property
    def num_ranks(self) -> int:
        """R."""
        return int(self.slots.shape[1])

    def holders(self) -> Flags:
        """[L, E, R]: whether a rank holds an expert."""
        return holders_of(self.slots, self.num_experts)

    def shares(self) -> F64:
        """[L, E, R]: the part of an expert's tokens that a rank computes; 0 everywhere for one without copy."""
        return np.diff(self.cuts, axis=2).astype(np.float64) / WHOLE

    def gone(self) -> tuple[tuple[int, int], ...]:
        """(layer, expert) of all that no rank holds, in order."""
        layers, experts = np.nonzero(~self.holders().any(axis=2))
        return tuple(zip(layers.tolist(), experts.tolist(), strict=True))

    def rank_load(self, tokens_LE: F64) -> F64:
        """[L, R]: tokens that each rank computes when experts get these. Those of experts without copy are nobody's."""
        load: F64 = np.einsum("le,ler->lr", tokens_LE, self.shares())
        return load

    def without(self, ranks: frozenset[int]) -> ExpertPlacement:
        """The same without what these ranks hold: their shares go to the other copies, in equal parts."""
        slots = self.slots.copy()
        slots[:, sorted(ranks)] = EMPTY
        kept = np.diff(self.cuts, axis=2)
        kept[:, :, sorted(ranks)] = 0
        holders = holders_of(slots, self.num_experts)
        # Copies that got nothing so far are holders like all others once somebody is missed.
        short = kept.sum(axis=2) < WHOLE
        cuts = np.where(short[:, :, None], even_cuts(holders), self.cuts)
        return replace(self, slots=slots, cuts=cuts)

    def check_integrity(self) -> None:
        """Raises IntegrityError where the invariants above do not hold."""
        if self.slots.size and (self.slots.min() < EMPTY or self.slots.max() >= self.num_experts):
            raise IntegrityError(f"a slot holds an expert outside 0 .. {self.num_experts - 1}")
        if self.cuts.shape != (self.num_layers, self.num_experts, self.num_ranks + 1):
            raise IntegrityError(f"cuts {self.cuts.shape} for slots {self.slots.shape}")
        holders = self.holders()
        if int(holders.sum()) != int((self.slots != EMPTY).sum()):
            raise IntegrityError("a rank holds an expert twice")
        parts = np.diff(self.cuts, axis=2)
        if (parts < 0).any() or (parts[~holders] != 0).any() or (self.cuts[:, :, 0] != 0).any():
            raise IntegrityError("tokens would go to a rank without the expert")
        if not np.array_equal(self.cuts[:, :, -1], np.where(holders.any(axis=2), WHOLE, 0)):
            raise IntegrityError("shares of an expert do not add up")


def holders_of(slots_LRC: I32, num_experts: int) -> Flags:
    """[L, E, R] whether rank r has expert e of layer l in a slot."""
    layers, ranks, _ = slots_LRC.shape
    held = np.zeros((layers, ranks, num_experts + 1), dtype=np.bool_)
    np.put_along_axis(held, slots_LRC.astype(np.int64) % (num_experts + 1), values=True, axis=2)
    return held[:, :, :num_experts].transpose(0, 2, 1)


def even_cuts(holders_LER: Flags) -> I32:
    """Cuts that give every copy of an expert an equal part."""
    copies = holders_LER.sum(axis=2, keepdims=True)
    before = np.concatenate([np.zeros_like(copies), np.cumsum(holders_LER, axis=2)], axis=2)
    cuts: I32 = (before * WHOLE // np.maximum(copies, 1)).astype(np.int32)
    return cuts


def cuts_from_shares(shares_LER: F64, holders_LER: Flags) -> I32:
    """Cuts next to these shares, whatever their sum; none for an expert without copy."""
    shares = np.where(holders_LER, np.maximum(shares_LER, 0.0), 0.0)
    total = shares.sum(axis=2, keepdims=True)
    shares = np.where(total > 0, shares, holders_LER)
    until = np.cumsum(shares, axis=2)
    parts = np.round(until / np.maximum(until[:, :, -1:], 1e-300) * WHOLE).astype(np.int64)
    return np.concatenate([np.zeros_like(parts[:, :, :1]), parts], axis=2).astype(np.int32)


def level_shares(tokens_LE: F64, holders_LER: Flags, sweeps: int = 12) -> F64:
    """Shares [L, E, R] under which the fullest rank of every layer is as empty as these copies allow.

    Each expert in turn pours its tokens over its copies like water over the ranks' other load. That is descent by
    blocks on the sum of squared loads, whose least point has the least maximum as well, since what copies can share
    are the bases of a polymatroid (Fujishige 1980).
    """
    copies = np.maximum(holders_LER.sum(axis=2, keepdims=True), 1)
    flow = np.where(holders_LER, tokens_LE[:, :, None] / copies, 0.0)
    load = flow.sum(axis=1)
    several = np.flatnonzero((holders_LER.sum(axis=2) > 1).any(axis=0))
    for _ in range(sweeps):
        moved = 0.0
        for expert in several.tolist():
            rest = load - flow[:, expert]
            poured = pour(rest, holders_LER[:, expert], tokens_LE[:, expert])
            moved = max(moved, float(np.abs(poured - flow[:, expert]).max()))
            load, flow[:, expert] = rest + poured, poured
        if moved <= 1e-6 * max(1.0, float(load.max(initial=0.0))):
            break
    totals = tokens_LE[:, :, None]
    return np.where(totals > 0, flow / np.maximum(totals, 1e-300), holders_LER / copies)


def pour(rest_LR: F64, open_LR: Flags, amount_L: F64) -> F64:
    """Fill the open ranks of each row to one level so that `amount` is added; nothing where none is open."""
    floor = np.where(open_LR, rest_LR, np.inf)
    steps = np.sort(floor, axis=1)
    known = np.where(np.isfinite(steps), steps, 0.0)
    count = np.arange(1, floor.shape[1] + 1)
    levels = (np.cumsum(known, axis=1) + amount_L[:, None]) / count
    # The level of the first k ranks is right when it covers those k and no further one.
    covers = np.isfinite(steps) & (levels >= steps)
    last = np.maximum(covers.sum(axis=1) - 1, 0)
    level = np.take_along_axis(levels, last[:, None], axis=1)
    return np.where(open_LR, np.maximum(level - rest_LR, 0.0), 0.0)
