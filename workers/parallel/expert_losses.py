"""What becomes of tokens whose expert no rank holds any more: the step is refused, or goes on without that expert.

Called by `expert_parallel.py`. Pure but for its count. It does not know why experts are gone, nor who refills them.
Legend: T tokens of this rank, k experts of a token, E experts, R ranks.
"""

from __future__ import annotations

import logging
from enum import StrEnum

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from penstock.workers.errors import ExpertsGoneError
from penstock.workers.parallel.expert_placement import ExpertPlacement

logger = logging.getLogger(__name__)

I64 = NDArray[np.int64]

NAMED = 8  # layers that a message names


class LossPolicy(StrEnum):
    """For steps whose tokens chose experts that are gone."""

    REFUSE = "refuse"  # no step with such tokens until they are refilled
    DEGRADE = "degrade"  # their weight goes to the token's other experts; texts may differ


class Losses:
    """The experts that are gone, and what was left out for it."""

    def __init__(self, policy: LossPolicy) -> None:
        """None are gone yet."""
        self._policy = policy
        self._pairs: tuple[tuple[int, int], ...] = ()
        self._gone: dict[int, I64] = {}  # the same by layer
        self.left_out = 0  # choices of this rank's tokens

    def update(self, placement: ExpertPlacement) -> None:
        """Take note of what a placement lacks, and say so where that changes."""
        before, now = self._pairs, placement.gone()
        self._pairs = now
        self._gone = {
            layer: np.array([expert for there, expert in now if there == layer], dtype=np.int64)
            for layer in dict.fromkeys(layer for layer, _ in now)
        }
        if now and now != before:
            logger.error("no rank holds %s", named_experts(now))
        elif before and not now:
            logger.warning("every expert is held again")

    def any_in(self, layer: int) -> bool:
        """Whether experts of this layer are gone."""
        return layer in self._gone

    def settle(self, layer: int, ids_Tk: I64, gates_Tk: Tensor, counts_RE: I64) -> tuple[I64, Tensor, I64]:
        """Choices, gates and counts with which the step can go on.

        A token's other gates grow in proportion, so that they add up to what they were; a token all of whose experts
        are gone gets nothing. Raises ExpertsGoneError where any rank's tokens need them and the policy is to refuse.
        """
        gone = self._gone[layer]
        if self._policy is LossPolicy.REFUSE:
            missed = gone[counts_RE[:, gone].any(axis=0)]
            if len(missed):
                pairs = tuple((layer, int(expert)) for expert in missed)
                raise ExpertsGoneError(f"tokens chose experts that no rank holds: {named_experts(pairs)}", pairs)
            return ids_Tk, gates_Tk, counts_RE
        lost = np.isin(ids_Tk, gone)
        self.left_out += int(lost.sum())
        kept_counts = counts_RE.copy()
        kept_counts[:, gone] = 0
        kept = gates_Tk.masked_fill(torch.from_numpy(lost).to(gates_Tk.device), 0.0)
        total, left = gates_Tk.sum(dim=1, keepdim=True), kept.sum(dim=1, keepdim=True)
        # Tokens that lose nothing keep their very gates.
        touched = torch.from_numpy(lost.any(axis=1)).to(gates_Tk.device)[:, None]
        grown = kept * (total / left.masked_fill(left == 0, 1.0))
        return np.where(lost, -1, ids_Tk), torch.where(touched, grown, gates_Tk), kept_counts


def named_experts(pairs: tuple[tuple[int, int], ...]) -> str:
    """For people: `layer 0: experts 1, 5; layer 3: expert 2`, and how many more layers."""
    by_layer: dict[int, list[str]] = {}
    for layer, expert in pairs:
        by_layer.setdefault(layer, []).append(str(expert))
    named = [
        f"layer {layer}: expert{'s' if len(experts) > 1 else ''} {', '.join(experts)}"
        for layer, experts in list(by_layer.items())[:NAMED]
    ]
    more = len(by_layer) - NAMED
    return "; ".join(named) + (f"; and {more} more layers" if more > 0 else "")
