"""Plans a new placement and brings its weights to where they will be needed, in a thread beside the steps.

Called by `expert_parallel.py`: every rank starts the same round at the same step, asks from step to step whether it is
done, and takes the result when all are. The leading rank plans; the others are told. Weights travel over collectives of
their own, one expert per rank and round, checked by digest on arrival. It does not know steps or tokens.

A round that fails anywhere closes its collectives, so that no rank waits for another in vain, and says so.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass, replace

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from penstock.kernels.packing import PackedExperts
from penstock.workers.errors import IntegrityError, PenstockError
from penstock.workers.parallel.collectives import Collectives
from penstock.workers.parallel.expert_agreement import share_placement
from penstock.workers.parallel.expert_load import LoadSnapshot, RouteTrace
from penstock.workers.parallel.expert_moves import ExpertMove, plan_moves, rounds, suppliers
from penstock.workers.parallel.expert_placement import ExpertPlacement
from penstock.workers.parallel.expert_planner import PlacementLimits, replan
from penstock.workers.parallel.expert_weights import ExpertSlots

logger = logging.getLogger(__name__)

Flags = NDArray[np.bool_]
F64 = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class RoundGroup:
    """Who takes part in a round: the collectives for it, and their ranks' numbers in the whole group."""

    collectives: Collectives
    members: tuple[int, ...]

    @property
    def rank(self) -> int:
        """This process, in the whole group."""
        return self.members[self.collectives.rank]


@dataclass(frozen=True, slots=True, eq=False)
class RoundTask:
    """What a round starts from; `tokens` is read by the leading rank only."""

    number: int  # of the round, from 1
    current: ExpertPlacement
    limits: PlacementLimits
    hosted: Flags  # [L, E, R] experts that ranks have in host memory
    tokens: F64  # [L, E]


class RebalancingRound:
    """One round on one rank. `done` is its number when this rank is ready, minus it when the round failed, else 0."""

    def __init__(self, group: RoundGroup, task: RoundTask, slots: ExpertSlots, trace: RouteTrace | None) -> None:
        """Starts at once. The trace is read (and faded) only on its own rank, and may grow meanwhile."""
        self._group, self._task, self._slots, self._trace = group, task, slots, trace
        self.done = 0
        self.placement = task.current
        self.staged: dict[tuple[int, int], tuple[int, PackedExperts]] = {}
        self._thread = threading.Thread(target=self._run, name="expert-moves", daemon=True)
        self._thread.start()

    @property
    def number(self) -> int:
        """Of the round."""
        return self._task.number

    def wait(self, timeout_s: float) -> None:
        """Returns when the thread has ended, or after the time-out."""
        self._thread.join(timeout_s)

    def _run(self) -> None:
        try:
            fresh = self._agree(self._transitions())
            self._fetch(fresh)
            self.placement = fresh
            self.done = self.number
        except (PenstockError, RuntimeError, MemoryError, OSError, ValueError):
            logger.warning("rank %d: rebalancing %d failed", self._group.rank, self.number, exc_info=True)
        finally:
            # Whatever happened, nobody waits for this rank in vain.
            if self.done == 0:
                self._group.collectives.close()
                self.done = -self.number

    def _transitions(self) -> Tensor:
        """Transitions of all ranks' tokens, float32 [L - 1, E, E]; [0, E, E] where nobody asks for them."""
        experts = self._task.current.num_experts
        if self._trace is None:
            return torch.zeros(0, experts, experts)
        own = torch.from_numpy(self._trace.transitions().astype(np.float32))
        self._trace.fade(0.5)
        return self._group.collectives.all_reduce(own)

    def _agree(self, transitions: Tensor) -> ExpertPlacement:
        """The leading rank's plan, on every rank."""
        task, group = self._task, self._group
        fresh = task.current
        if group.collectives.rank == 0:
            load = LoadSnapshot(task.tokens, transitions.numpy().astype(np.float64), 0)
            available = np.any(suppliers(task.current, group.members, task.hosted), axis=2)
            planned = replan(task.current, load, group.members, task.limits, available)
            fresh = replace(planned, generation=task.current.generation + 1)
        return share_placement(group.collectives, fresh, torch.device("cpu"))

    def _fetch(self, fresh: ExpertPlacement) -> None:
        task, group = self._task, self._group
        moves = plan_moves(task.current, fresh, group.members, task.hosted)
        for move in moves:
            if move.source == move.target == group.rank:
                self._stage(move, self._slots.row(move.layer, move.expert))
        for each in rounds(moves):
            self._carry(each)
        if moves and group.collectives.rank == 0:
            logger.info("rebalancing %d: %d experts move", self.number, len(moves))

    def _carry(self, moves: tuple[ExpertMove, ...]) -> None:
        """One round of exchange: at most one expert leaves each rank and at most one comes."""
        group = self._group
        leaving = [move for move in moves if move.source == group.rank]
        coming = [move for move in moves if move.target == group.rank]
        rows = torch.empty(0, self._slots.shape.row_numbers, dtype=self._slots.shape.dtype)
        marks = torch.empty(0, 2, dtype=torch.int64)
        if leaving:
            rows = self._slots.row(leaving[0].layer, leaving[0].expert)[None]
            marks = _digest(rows[0])[None]
        sent = [sum(move.target == member for move in leaving) for member in group.members]
        received = [sum(move.source == member for move in coming) for member in group.members]
        arrived = group.collectives.all_to_all(rows, sent, received)
        expected = group.collectives.all_to_all(marks, sent, received)
        for move, row, mark in zip(coming, arrived, expected, strict=True):
            if not torch.equal(_digest(row), mark):
                raise IntegrityError(f"expert {move.expert} of layer {move.layer} arrived damaged from {move.source}")
            self._stage(move, row)

    def _stage(self, move: ExpertMove, row: Tensor) -> None:
        self.staged[move.layer, move.slot] = (move.expert, self._slots.pack(row))


def _digest(row: Tensor) -> Tensor:
    """128 bits against accidents, int64 [2]."""
    digest = xxhash.xxh3_128_digest(row.view(torch.uint8).numpy().data)
    return torch.frombuffer(bytearray(digest), dtype=torch.int64)
