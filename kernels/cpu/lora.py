"""Low-rank adapters, many in one batch, on the CPU: a pair of products per adapter, or gathered ones where all differ.

Called through `kernels/ops.py`; knows only tensors. Legend: T tokens, K inputs, M outputs, R rank, S adapter slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from penstock.kernels.adapters import check_lora
from penstock.kernels.packing import LoraPlan
from penstock.kernels.reference import lora as reference

TILE = 16  # tokens, as in `native/lora.cpp`


@dataclass(frozen=True, slots=True, eq=False)
class TiledPlan(LoraPlan):
    """`tiles` is int64 [n, 3], of at most `TILE` tokens each: slot, and from where to where in `order`."""

    tiles: Tensor


def plan_lora(slots: Tensor, device: torch.device | None = None, per_token: bool = False) -> TiledPlan:
    """See `ops.plan_lora`; `per_token` makes no difference here. The tiles are for the kernel in C++."""
    plan = reference.plan_lora(slots, device, per_token)
    tiles = [
        (slot, begin, min(begin + TILE, end)) for slot, start, end in plan.segments for begin in range(start, end, TILE)
    ]
    placed = torch.tensor(tiles, dtype=torch.int64).view(-1, 3)
    return TiledPlan(plan.num_tokens, plan.num_slots, plan.order, plan.segments, placed)


def lora_add(y_TM: Tensor, x_TK: Tensor, a_SRK: Tensor, b_SMR: Tensor, scales_S: Tensor, plan: LoraPlan) -> None:
    """See `ops.lora_add`. The low-rank vectors and the sum are kept in float32."""
    check_lora(y_TM, x_TK, a_SRK, b_SMR, scales_S, plan)
    for slot, start, end in plan.segments:
        tokens = plan.order[start:end]
        low = torch.mm(x_TK[tokens].float(), a_SRK[slot].float().t()).mul_(scales_S[slot].float())
        y_TM[tokens] = torch.addmm(y_TM[tokens].float(), low, b_SMR[slot].float().t()).to(y_TM.dtype)
