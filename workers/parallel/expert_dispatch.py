"""Which rows of a layer go to which rank, and in what order they arrive: the arithmetic of dispatch and combine.

Called by `expert_exchange.py`. Pure numpy: every rank computes the same split from the same counts, so that nothing
but the counts (E integers per rank) is agreed on before the rows travel, and a receiver knows each row's expert from
its place. Rows are sorted by expert and never padded or dropped (dynamic gating, Huang et al. 2023); an expert with
several copies is split over them as Lazarus does (2024, section 4.4): each copy gets its share to within one row, a
rank's own rows fill its own copy first, and only what is over travels.

Legend: T tokens of this rank, k experts of a token, E experts, R ranks of the whole group, N rows that have an expert.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from penstock.workers.errors import IntegrityError
from penstock.workers.parallel.expert_placement import I32, WHOLE

I64 = NDArray[np.int64]

# Steps of the sequence that decides who gets the odd row: near the golden ratio, they meet every part of a share alike.
_STEP_TURN, _STEP_EXPERT = 648_055, 400_527


@dataclass(frozen=True, slots=True, eq=False)
class RowSplit:
    """How many rows of each expert go from each rank to each rank, int64 [R from, E, R to]; equal on all ranks."""

    rows: I64

    def rank_rows(self) -> I64:
        """[R] rows that each rank computes."""
        rows: I64 = self.rows.sum(axis=(0, 1))
        return rows

    def sent(self, rank: int) -> I64:
        """[R] rows that leave this rank for each; none for itself."""
        return _but_own(self.rows[rank].sum(axis=0), rank)

    def received(self, rank: int) -> I64:
        """[R] rows that come to this rank from each; none from itself."""
        return _but_own(self.rows[:, :, rank].sum(axis=1), rank)

    def kept(self, rank: int) -> int:
        """Rows that this rank computes itself for its own tokens."""
        return int(self.rows[rank, :, rank].sum())

    def arriving_experts(self, rank: int) -> I64:
        """The expert of every row that this rank computes: those received, by sender and then expert; then its own."""
        experts = np.arange(self.rows.shape[1])
        senders = [*(other for other in range(len(self.rows)) if other != rank), rank]
        return np.concatenate([np.repeat(experts, self.rows[sender, :, rank]) for sender in senders])

    def departure(self, rank: int, ids_N: I64) -> I64:
        """The order, int64 [N'], in which this rank's rows leave: for rank 0 first (its own last), by expert, by token.

        `ids_N` are the experts of the rank's T k rows, -1 for none: those are in no order. Raises IntegrityError where
        they are not those that were counted.
        """
        order = np.argsort(ids_N, kind="stable")
        order = order[int((ids_N < 0).sum()) :]
        own = self.rows[rank]
        ranks = own.shape[1]
        target = np.repeat(np.tile(np.arange(ranks), own.shape[0]), own.reshape(-1))
        if len(target) != len(order):
            raise IntegrityError(f"{len(order)} rows have an expert, {len(target)} were announced")
        target = np.where(target == rank, ranks, target)
        return order[np.argsort(target, kind="stable")]


def split_rows(counts_RE: I64, cuts_ER: I32, turn: int) -> RowSplit:
    """Split each rank's rows of each expert over the expert's copies. Rows of an expert without copy go nowhere.

    `cuts` [E, R + 1] are a layer's of `ExpertPlacement`. `turn` (of the step and layer) decides who gets a row that
    cannot be halved, so that over many turns every copy gets its very share.
    """
    ranks, experts = counts_RE.shape
    totals = counts_RE.sum(axis=0)
    start = (turn * _STEP_TURN + np.arange(experts, dtype=np.int64) * _STEP_EXPERT) % WHOLE
    # Systematic rounding: differences of rounded sums are whole, add up, and are within one of what is exact.
    until = (totals[:, None] * cuts_ER.astype(np.int64) + start[:, None]) // WHOLE
    room = np.diff(until, axis=1).T  # [R, E]
    own = np.minimum(room, counts_RE)
    surplus, free = counts_RE - own, room - own
    # What is over is laid out along one line, and so is what is free: they meet where their intervals overlap.
    surplus_end, free_end = np.cumsum(surplus, axis=0), np.cumsum(free, axis=0)
    high = np.minimum(surplus_end[:, None], free_end[None, :])
    low = np.maximum((surplus_end - surplus)[:, None], (free_end - free)[None, :])
    rows = np.maximum(high - low, 0)
    here = np.arange(ranks)
    rows[here, here] += own
    return RowSplit(np.ascontiguousarray(rows.transpose(0, 2, 1)))


def _but_own(counts: I64, rank: int) -> I64:
    counts[rank] = 0
    return counts
