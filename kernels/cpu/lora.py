"""Low-rank adapters, many in one batch, on the CPU: a pair of products per adapter, or gathered ones where all differ.

Called through `kernels/ops.py`; knows only tensors. Legend: T tokens, K inputs, M outputs, R rank, S adapter slots.
"""

from __future__ import annotations

import torch
from torch import Tensor

from penstock.kernels.adapters import check_lora
from penstock.kernels.packing import LoraPlan
from penstock.kernels.reference import lora as reference


def plan_lora(slots: Tensor, device: torch.device | None = None, per_token: bool = False) -> LoraPlan:
    """See `ops.plan_lora`; `per_token` makes no difference here."""
    return reference.plan_lora(slots, device, per_token)


def lora_add(y_TM: Tensor, x_TK: Tensor, a_SRK: Tensor, b_SMR: Tensor, scales_S: Tensor, plan: LoraPlan) -> None:
    """See `ops.lora_add`. The low-rank vectors and the sum are kept in float32."""
    check_lora(y_TM, x_TK, a_SRK, b_SMR, scales_S, plan)
    for slot, start, end in plan.segments:
        tokens = plan.order[start:end]
        low = torch.mm(x_TK[tokens].float(), a_SRK[slot].float().t()).mul_(scales_S[slot].float())
        y_TM[tokens] = torch.addmm(y_TM[tokens].float(), low, b_SMR[slot].float().t()).to(y_TM.dtype)
