"""Data-parallel attention: which rows of a step's plan each attention rank computes, and its part of the plan.

Every rank of a group gets the whole plan and cuts its own part out of it, so rank 0 plans once and says it once. A row
belongs to the rank in whose bank its blocks lie (`kv/banks.py`), so the plan needs no word about it. Long prompts are
computed by all ranks together (`shared_prompts.py` says which, `context_parallel.py` how). Called by `rank_states.py`
on every rank, for every plan in order. Pure numpy; it does not know models or messages.

Legend: N rows of the plan, S of them sampled, M prompt tokens scored; R attention ranks.
"""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from penstock.workers.parallel.context_parallel import SharedChunk
from penstock.workers.parallel.shared_prompts import Banks, SharedPrompts
from penstock.workers.scheduler.plan import I32, SamplingBatch, ScoredPrompt, StepPlan

I64 = NDArray[np.int64]


class Piece(NamedTuple):
    """Tokens `[begin, end)` of those that a row of the plan computes."""

    row: int
    begin: int
    end: int


class PlanCut:
    """One plan, cut for all ranks."""

    def __init__(self, plan: StepPlan, members: tuple[int, ...], banks: Banks, shared: tuple[SharedChunk, ...]) -> None:
        """`members` are the ranks, ascending; ranks are named by the numbers of their banks."""
        self.plan = plan
        self.shared = shared
        self._chunk_of_row = {chunk.row: chunk for chunk in shared}
        self._members = members
        self._banks = banks
        self._owners: I32 = plan.block_tables[:, 0] // banks.blocks
        self._counts = np.diff(plan.offsets)

    @cached_property
    def wanted(self) -> list[tuple[I64, I64]]:
        """Of every member: which of the S sampled rows, and which of the M scored tokens, it computes."""
        of_sampled, of_scored = self._owners[self.plan.sample_rows], self._owners_of_scored()
        for chunk in self.shared:
            last = self._members[chunk.last_rank]
            of_sampled = np.where(self.plan.sample_rows == chunk.row, last, of_sampled)
        return [(np.flatnonzero(of_sampled == rank), np.flatnonzero(of_scored == rank)) for rank in self._members]

    def part(self, rank: int) -> StepPlan:
        """What this rank computes, perhaps no row at all: a plan by itself, with block ids of the rank's own storage.

        It samples nothing: its `sample_rows` say of which rows the state is wanted, and `sampling` is empty.
        """
        plan, pieces = self.plan, self._pieces(rank)
        rows = np.array([piece.row for piece in pieces], np.intp)
        begins = np.array([piece.begin for piece in pieces], np.int32)
        counts = np.array([piece.end - piece.begin for piece in pieces], np.int32)
        offsets = np.zeros(len(pieces) + 1, np.int32)
        np.cumsum(counts, out=offsets[1:])
        # Token t of the part is token t + shift of the plan, piece by piece.
        tokens = np.arange(int(offsets[-1])) + np.repeat(plan.offsets[rows] + begins - offsets[:-1], counts)
        ends = {piece.row: place for place, piece in enumerate(pieces) if piece.end == self._counts[piece.row]}
        sampled, scored = self.wanted[self._members.index(rank)]
        mine = plan.copies[plan.copies[:, 1] // self._banks.blocks == rank]
        return StepPlan(
            step=plan.step,
            slots=plan.slots[rows],
            starts=plan.starts[rows] + begins,
            offsets=offsets,
            token_ids=plan.token_ids[tokens],
            block_tables=self._tables(rows, rank),
            sample_rows=np.array([ends[row] for row in plan.sample_rows[sampled].tolist()], np.int32),
            sampling=NO_SAMPLING,
            num_decode=sum(piece.row < plan.num_decode for piece in pieces),
            copies=mine - rank * self._banks.blocks,
            scored=None if plan.scored is None else _scored(plan.scored, scored, tokens),
        )

    def tables_of_shared(self, rank: int) -> list[I32]:
        """Of each shared prompt, the blocks in which this rank keeps it: its own, or scratch."""
        return list(self._tables(np.array([chunk.row for chunk in self.shared], np.intp), rank))

    def _pieces(self, rank: int) -> list[Piece]:
        """Whole rows in the plan's order, then what falls to this rank of shared prompts."""
        own = np.flatnonzero(self._owners == rank).tolist()
        pieces = [Piece(row, 0, int(self._counts[row])) for row in own if row not in self._chunk_of_row]
        for chunk in self.shared:
            pieces += [Piece(chunk.row, begin, end) for begin, end in chunk.pieces[self._members.index(rank)]]
        return pieces

    def _tables(self, rows: NDArray[np.intp], rank: int) -> I32:
        # Unused entries are 0 in every plan.
        tables: I32 = np.maximum(self.plan.block_tables[rows] - rank * self._banks.blocks, 0)
        for place, row in enumerate(rows.tolist()):
            chunk = self._chunk_of_row.get(row)
            if chunk is not None and self._members[chunk.owner] != rank:
                tables[place, : len(chunk.scratch)] = chunk.scratch
        return tables

    def _owners_of_scored(self) -> I32:
        if self.plan.scored is None:
            return self._owners[:0]
        owners: I32 = self._owners[np.searchsorted(self.plan.offsets, self.plan.scored.token_rows, side="right") - 1]
        return owners


class PlanParts:
    """Cuts plans for the attention ranks `members`. What it remembers from step to step follows from the plans alone.

    Members that are new to a prompt, or repeat a step, get its beginning from its owner.
    """

    def __init__(self, members: tuple[int, ...], banks: Banks, block_size: int) -> None:
        self._members = members
        self._banks = banks
        self._block_size = block_size
        self._prompts = self._nothing_kept()
        self._step = -1

    def cut(self, plan: StepPlan) -> PlanCut:
        """Of the next plan, or of the last one again; every rank must be given every plan."""
        if plan.step == self._step:  # cut short once, who knows where
            self._prompts = self._nothing_kept()
        self._step = plan.step
        return PlanCut(plan, self._members, self._banks, self._prompts.choose(plan))

    def _nothing_kept(self) -> SharedPrompts:
        return SharedPrompts(self._members, self._banks, self._block_size)


def _scored(scored: ScoredPrompt, chosen: I64, tokens: I64) -> ScoredPrompt:
    """The chosen entries; `tokens` are those of the plan in this part."""
    places = {token: place for place, token in enumerate(tokens.tolist())}
    rows = [places[row] for row in scored.token_rows[chosen].tolist()]
    return ScoredPrompt(np.array(rows, np.int32), scored.targets[chosen], scored.alternatives[chosen])


_NO_INTS: I32 = np.zeros(0, np.int32)
_NO_FLOATS = np.zeros(0, np.float32)
NO_SAMPLING = SamplingBatch(
    _NO_FLOATS, _NO_INTS, _NO_FLOATS, _NO_FLOATS, np.zeros(0, np.uint64), _NO_INTS, _NO_INTS, _NO_INTS
)
