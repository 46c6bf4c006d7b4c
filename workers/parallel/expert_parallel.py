"""Expert parallelism of one rank: the experts of every layer, spread over the group, behind one `forward`.

Called by the decoder's expert layers (`forward`), and by whoever drives a rank's steps (`begin_step`, `end_step`,
`regroup`). Every rank of the group makes the same calls in the same order, also where it has no tokens of its own:
attention is data-parallel, experts are not. It does not know models, sequences or schedules.

How it works: `expert_dispatch.py` says which rows travel, `expert_exchange.py` moves them, `expert_weights.py` holds
this rank's experts, `expert_rebalancing.py` plans and fetches beside the steps. What ranks must agree on rides along
with the counts that they exchange anyway: which placement they use, and whether fresh weights have arrived.

Invariants: placements change between steps only, on all ranks after the same step; ranks that do not agree stop before
rows travel (IntegrityError on each). After a GroupError nothing is usable but `regroup`.
Legend: L layers with experts, E experts, R ranks of the whole group, T tokens of this rank, k experts of a token.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from penstock.kernels import ops
from penstock.workers.errors import IntegrityError
from penstock.workers.parallel.collectives import Collectives
from penstock.workers.parallel.expert_agreement import (
    NO_STATE,
    StepHeader,
    exchange_counts,
    exchange_hosted,
    exchange_states,
    share_placement,
)
from penstock.workers.parallel.expert_dispatch import split_rows
from penstock.workers.parallel.expert_exchange import ExpertExchange
from penstock.workers.parallel.expert_load import ExpertLoad, RouteTrace
from penstock.workers.parallel.expert_losses import Losses, LossPolicy
from penstock.workers.parallel.expert_moves import suppliers
from penstock.workers.parallel.expert_placement import EMPTY, ExpertPlacement
from penstock.workers.parallel.expert_planner import PlacementLimits, copies_wanted, first_placement
from penstock.workers.parallel.expert_rebalancing import RebalancingRound, RoundGroup, RoundTask
from penstock.workers.parallel.expert_weights import ExpertShape, ExpertSlots, ExpertSource, hosted_by

logger = logging.getLogger(__name__)

I64 = NDArray[np.int64]
F64 = NDArray[np.float64]
Flags = NDArray[np.bool_]

# (name, rank, width, whether it works beside steps) -> collectives of a group that exists once the call returns
Meet = Callable[[str, int, int, bool], Collectives]

MOST_FAILED_ROUNDS = 3  # in a row; then nothing is rebalanced until ranks leave or come


@dataclass(frozen=True, slots=True)
class ExpertPolicy:
    """How experts are spread, watched and given up."""

    limits: PlacementLimits
    rebalance_steps: int = 256  # a round starts every so many steps; 0 = only after ranks left or came
    half_life_steps: float = 256.0  # of the observed load
    losses: LossPolicy = LossPolicy.REFUSE


@dataclass(frozen=True, slots=True)
class ExpertRank:
    """Who this process is. One that joins a running group begins without experts."""

    rank: int
    num_ranks: int
    joins: bool = False
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


class ExpertParallel:
    """One rank's expert layers. `regroup` must be called once before the first step. Not thread-safe."""

    def __init__(
        self, who: ExpertRank, shape: ExpertShape, source: ExpertSource, policy: ExpertPolicy, meet: Meet
    ) -> None:
        """Reads this rank's experts from `source`. Raises ConfigError where the experts do not fit the ranks."""
        self._who, self._shape, self._policy, self._meet = who, shape, policy, meet
        placement = first_placement(shape.num_layers, shape.num_experts, who.num_ranks, policy.limits)
        self._source = source
        self._hosted: Flags = np.zeros((shape.num_layers, shape.num_experts, who.num_ranks), dtype=np.bool_)
        own = placement.slots[:, who.rank]
        self._slots = ExpertSlots(shape, source, np.full_like(own, EMPTY) if who.joins else own, who.device)
        self._placement = placement
        self._generation = NO_STATE if who.joins else 0  # of what the slots hold
        self._load = ExpertLoad(shape.num_layers, shape.num_experts, policy.half_life_steps)
        traced = policy.limits.affinity > 0
        self._trace = RouteTrace(shape.num_layers, shape.num_experts) if traced else None
        self._losses = Losses(policy.losses)
        self._rank_rows: F64 = np.zeros((shape.num_layers, who.num_ranks))
        self.members: tuple[int, ...] = ()
        self._group: Collectives | None = None
        self._exchange: ExpertExchange | None = None
        self._round_group: RoundGroup | None = None
        self._round: RebalancingRound | None = None
        self._rounds = self._failed_rounds = self._sequence = 0
        self.epoch = -1  # of the last group that this rank tried to meet
        self._mend = False
        self._done: tuple[int, ...] | None = None  # every rank's answer about the round, once known in a step

    @property
    def placement(self) -> ExpertPlacement:
        """In use now; equal on all ranks."""
        return self._placement

    @property
    def gone(self) -> tuple[tuple[int, int], ...]:
        """(layer, expert) of those that no rank holds."""
        return self._placement.gone()

    @property
    def degraded_rows(self) -> int:
        """Choices of this rank's tokens left out because their expert was gone."""
        return self._losses.left_out

    @property
    def wants_pump(self) -> bool:
        """A round is to start, or has come to an end on this rank: without steps to come, `pump` is of use."""
        if self._round is None:
            return self._mend and self._failed_rounds < MOST_FAILED_ROUNDS
        return self._round.done != 0

    @property
    def mending(self) -> bool:
        """Experts that lack copies are to get some, by the round under way or by one that is to start."""
        return self._round is not None or self.wants_pump

    def rank_rows(self) -> F64:
        """[L, R] rows that each rank computed, decayed like the load; equal on all ranks."""
        return self._rank_rows.copy()

    def forward(self, layer: int, x_TK: Tensor, ids_Tk: Tensor, weights_Tk: Tensor, activation: str = "silu") -> Tensor:
        """`ops.fused_moe` over all experts of a layer (numbered from 0 among those with experts), [T, K].

        `ids` are int32 or int64 in -1 .. E - 1, `weights` [T, k]; T may be 0. Raises GroupError when a rank is gone,
        ExpertsGoneError when tokens chose experts that nobody holds and the policy is to refuse: on every rank.
        """
        group, exchange = self._group, self._exchange
        if group is None or exchange is None:
            raise IntegrityError("regroup comes before the first step")
        ids = ids_Tk.to(torch.device("cpu"), torch.int64).numpy()
        counts = self._counts(group, layer, ids, x_TK.device)
        self._load.observe(layer, counts.sum(axis=0))
        if self._trace is not None and self._trace.wanted():
            most = self._trace.most_tokens
            self._trace.observe(layer, ids[:most], weights_Tk[:most].double().cpu().numpy())
        gates = weights_Tk
        if self._losses.any_in(layer):
            ids, gates, counts = self._losses.settle(layer, ids, gates, counts)
        # Consecutive turns for consecutive steps: that is what evens out who gets odd rows.
        split = split_rows(counts, self._placement.cuts[layer], self._sequence + 7919 * layer)
        self._rank_rows[layer] += split.rank_rows()
        return exchange.run(
            x_TK, ids, gates, split, lambda rows, experts: self._compute(layer, rows, experts, activation)
        )

    def begin_step(self, sequence: int) -> None:
        """A step's number, from 0 on, the same on every rank; a step that is run again keeps it."""
        self._sequence = sequence
        self._done = None
        self._load.drop_step()

    def end_step(self) -> None:
        """After every layer of a step: take up a placement that all ranks are ready for, or start to look for one.

        Raises GroupError when a rank is gone; the step itself is done then.
        """
        self._load.end_step()
        self._rank_rows *= 0.5 ** (1.0 / self._policy.half_life_steps)
        if self._trace is not None:
            self._trace.end_step()
        done, self._done = self._done, None
        if done is None:
            return
        every = self._policy.rebalance_steps
        self._advance(done, periodic=every > 0 and (self._sequence + 1) % every == 0)

    def pump(self) -> None:
        """In place of a step, while there are none: lets a round come to its end, so that lost experts come back."""
        if self._group is None:
            raise IntegrityError("regroup comes before everything else")
        nothing = np.zeros(self._shape.num_experts, dtype=np.int64)
        # No step's number: a rank may not have seen the begin of one that was cut short.
        header = replace(self._header(-1), sequence=0)
        done, _ = exchange_counts(self._group, header, nothing, self._who.device)
        self._advance(done, periodic=False)

    def regroup(self, members: tuple[int, ...], epoch: int) -> None:
        """Go on with these ranks (ascending numbers): at start, after a GroupError, or to let one join again.

        Collective over `members`; `epoch` must be new. A step that was under way is void and is to be run again.
        Copies elsewhere take over at once; a round that restores lost copies starts after the next step. Raises
        GroupError where a member does not come.
        """
        self.close()
        self._load.drop_step()
        if self._trace is not None:
            self._trace.end_step()
        self.epoch = epoch
        group = self._meet(f"experts-{epoch}", members.index(self._who.rank), len(members), False)
        self._group, self._exchange = group, ExpertExchange(group, members)
        self.members, self._failed_rounds, self._done = members, 0, None
        state = exchange_states(group, self._generation, self._rounds, self._who.device)
        if NO_STATE < self._generation < state.generation:
            # Others switched at the end of the step that this rank did not see the end of.
            self._take_up()
        self._round, self._rounds = None, state.rounds
        self._hosted[:] = False
        self._hosted[:, :, list(members)] = exchange_hosted(
            group, hosted_by(self._source, self._shape), self._who.device
        )
        joined = {member for member, held in zip(members, state.generations, strict=True) if held == NO_STATE}
        absent = frozenset(range(self._who.num_ranks)) - set(members) | joined
        self._adopt(share_placement(group, self._placement, self._who.device).without(absent))
        self._mend = self._is_short()

    def close(self) -> None:
        """Leave the group; peers notice at once. Harmless when repeated."""
        if self._group is not None:
            self._group.close()
        if self._round_group is not None:
            self._round_group.collectives.close()
        self._group = self._exchange = self._round_group = None

    def _header(self, layer: int) -> StepHeader:
        done = self._round.done if self._round is not None else 0
        return StepHeader(self._generation, self._sequence, layer, done)

    def _counts(self, group: Collectives, layer: int, ids_Tk: I64, device: torch.device) -> I64:
        """[R, E] rows of each expert that each rank has; none of those that are absent."""
        counts = np.bincount(ids_Tk.reshape(-1) + 1, minlength=self._shape.num_experts + 1)[1:]
        done, rows = exchange_counts(group, self._header(layer), counts, device)
        if self._done is None:
            # The first answer of a step counts: every rank that sees the step's end has seen the same.
            self._done = done
        everyone = np.zeros((self._who.num_ranks, self._shape.num_experts), dtype=np.int64)
        everyone[list(self.members)] = rows
        return everyone

    def _compute(self, layer: int, rows_NK: Tensor, experts_N: I64, activation: str) -> Tensor:
        """The products of rows with one expert each, not weighted."""
        if not len(experts_N):
            return rows_NK
        places = self._slots.places(layer)[experts_N]
        if (places < 0).any():
            raise IntegrityError(f"rows of layer {layer} came to a rank without their expert")
        ids = torch.from_numpy(places[:, None]).to(rows_NK.device, torch.int32)
        gates = torch.ones(ids.shape, dtype=torch.float32, device=rows_NK.device)
        return ops.fused_moe(rows_NK, self._slots.packed(layer), ids, gates, activation)

    def _advance(self, done: tuple[int, ...], *, periodic: bool) -> None:
        """Every rank decides the same from the same answers."""
        if self._round is None:
            if (self._mend or (periodic and len(self.members) > 1)) and self._failed_rounds < MOST_FAILED_ROUNDS:
                self._start_round()
        elif -self._round.number in done:
            self._give_up_round()
        elif set(done) == {self._round.number}:
            self._take_up()
            self._round, self._failed_rounds = None, 0

    def _start_round(self) -> None:
        if self._round_group is None:
            # Rounds have collectives of their own, since they run beside steps; met only now, so that ranks which
            # lost one of them go on the sooner.
            position, name = self.members.index(self._who.rank), f"expert-moves-{self.epoch}-{self._rounds}"
            self._round_group = RoundGroup(self._meet(name, position, len(self.members), True), self.members)
        self._rounds += 1
        self._mend = False
        task = RoundTask(self._rounds, self._placement, self._policy.limits, self._hosted, self._load.tokens())
        self._round = RebalancingRound(self._round_group, task, self._slots, self._trace)

    def _give_up_round(self) -> None:
        """After it failed somewhere; the next one has new collectives."""
        self._round = None
        self._failed_rounds += 1
        self._mend = self._is_short()
        if self._round_group is not None:
            self._round_group.collectives.close()
            self._round_group = None

    def _take_up(self) -> None:
        """Use what the finished round brought."""
        finished = self._round
        if finished is None or finished.done <= 0:
            raise IntegrityError("the group uses a placement whose weights are not here")
        before = self._placement.slots
        self._placement = finished.placement
        self._slots.switch(self._placement.slots[:, self._who.rank], finished.staged)
        self._generation = self._placement.generation
        self._losses.update(self._placement)
        # A round that changed nothing would change nothing again.
        self._mend = not np.array_equal(before, self._placement.slots) and self._is_short()

    def _adopt(self, placement: ExpertPlacement) -> None:
        """Use the leading rank's placement, which this rank's slots must fit."""
        own = placement.slots[:, self._who.rank]
        if self._generation == NO_STATE:
            self._slots.switch(own, {})
        elif not np.array_equal(own, self._slots.slots):
            raise IntegrityError(f"rank {self._who.rank} holds other experts than the leading rank believes")
        self._placement, self._generation = placement, placement.generation
        self._losses.update(placement)

    def _is_short(self) -> bool:
        """Whether experts have fewer copies than they should and could."""
        experts, members = self._shape.num_experts, len(self.members)
        slots = max(self._policy.limits.slots_per_rank, -(-experts // members))
        wanted = copies_wanted(experts, slots, members, self._policy.limits.least_copies)
        able = suppliers(self._placement, self.members, self._hosted).any(axis=2)
        return bool((able & (self._placement.holders().sum(axis=2) < wanted)).any())
