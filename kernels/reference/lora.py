"""Low-rank adapters, many in one batch, written for plainness: one pair of products per adapter in use.

Called through `kernels/ops.py`; knows only tensors. Legend: T tokens, K inputs, M outputs, R rank, S adapter slots.
"""

from __future__ import annotations

import torch
from torch import Tensor

from penstock.kernels.adapters import check_lora, slots_needed, sorted_segments
from penstock.kernels.packing import LoraPlan


def plan_lora(slots: Tensor, device: torch.device | None = None, per_token: bool = False) -> LoraPlan:
    """See `ops.plan_lora`; `per_token` makes no difference here."""
    order, segments = sorted_segments(slots)
    placed = torch.from_numpy(order).to(slots.device if device is None else device)
    return LoraPlan(len(slots), slots_needed(segments), placed, segments)


def lora_add(y_TM: Tensor, x_TK: Tensor, a_SRK: Tensor, b_SMR: Tensor, scales_S: Tensor, plan: LoraPlan) -> None:
    """See `ops.lora_add`; float32 arithmetic at least."""
    check_lora(y_TM, x_TK, a_SRK, b_SMR, scales_S, plan)
    dtype = torch.promote_types(x_TK.dtype, torch.float32)
    for slot, start, end in plan.segments:
        tokens = plan.order[start:end]
        low = x_TK[tokens].to(dtype) @ a_SRK[slot].to(dtype).t()
        change = low @ b_SMR[slot].to(dtype).t() * scales_S[slot].to(dtype)
        y_TM[tokens] = (y_TM[tokens].to(dtype) + change).to(y_TM.dtype)
