"""Data-parallel attention inside a step: a rank's part of the plan, and all ranks' hidden states where one samples.

Used by `workers/runner.py` on every rank of a group whose ranks attend for sequences of their own. The states of the
rows that are sampled or scored, computed wherever their sequences live, come together on attention rank 0, in the order
of the whole plan, so that sampling there does not know that it was ever cut. It knows tensors and plans, no models.

Legend: S sampled rows and M scored tokens of the plan, S' and M' of this rank; E hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from penstock.workers.errors import IntegrityError
from penstock.workers.parallel.attention_ranks import PlanCut, PlanParts
from penstock.workers.parallel.collectives import Collectives
from penstock.workers.parallel.context_parallel import ContextExchange
from penstock.workers.parallel.shared_prompts import Banks
from penstock.workers.scheduler.plan import StepPlan


class RankStates:
    """`group`: the attention ranks, one of each copy of the layers."""

    def __init__(self, group: Collectives, banks: Banks, block_size: int) -> None:
        self._banks = banks
        self._block_size = block_size
        self.regroup(group, tuple(range(group.width)))

    def regroup(self, group: Collectives, members: tuple[int, ...]) -> None:
        """Go on with these ranks, ascending; rank 0 is one of them. Others may have no row in any later plan."""
        self._group, self._members = group, members
        self._parts = PlanParts(members, self._banks, self._block_size)

    def close(self) -> None:
        """Leave the group; peers notice at once. Only `regroup` may follow."""
        self._group.close()

    @property
    def members(self) -> tuple[int, ...]:
        """The ranks that are there."""
        return self._members

    @property
    def samples(self) -> bool:
        """This rank gets the states of all."""
        return self._group.rank == 0

    def cut(self, plan: StepPlan) -> PlanCut:
        """Who computes what of the next plan. Every rank calls it for every plan."""
        return self._parts.cut(plan)

    def part(self, cut: PlanCut) -> StepPlan:
        """What this rank computes; perhaps no row at all."""
        return cut.part(self._members[self._group.rank])

    def exchange(self, cut: PlanCut, device: torch.device) -> ContextExchange | None:
        """How the ranks share the keys and values of prompts that all of them compute; None where there are none."""
        if not cut.shared:
            return None
        tables = cut.tables_of_shared(self._members[self._group.rank])
        return ContextExchange(self._group, cut.shared, tables, self._block_size, device)

    def gather(self, cut: PlanCut, hidden: Tensor) -> Tensor:
        """From each rank's hidden [S' + M', E] those of the whole plan, [S + M, E], on rank 0; [0, E] elsewhere.

        Every rank calls it once per step. Raises GroupError, and IntegrityError for states that are not those wanted.
        """
        wanted = cut.wanted
        counts = [len(sampled) + len(scored) for sampled, scored in wanted]
        if len(hidden) != counts[self._group.rank]:
            raise IntegrityError(f"{len(hidden)} hidden states of {counts[self._group.rank]} wanted rows")
        send = [len(hidden), *[0] * (self._group.width - 1)]
        receive = counts if self.samples else [0] * self._group.width
        gathered = self._group.all_to_all(hidden, send, receive)
        if not self.samples:
            return gathered
        # Rank after rank, each with its sampled rows first; the plan wants all sampled rows first.
        behind = len(cut.plan.sample_rows)
        places = [torch.from_numpy(part) for sampled, scored in wanted for part in (sampled, scored + behind)]
        ordered = torch.empty_like(gathered)
        ordered[torch.cat(places).to(gathered.device)] = gathered
        return ordered
