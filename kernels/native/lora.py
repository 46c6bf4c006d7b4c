"""Low-rank adapters, many in one batch, in tiles of tokens of one adapter; see `lora.cpp`.

Called through `kernels/ops.py`; knows only tensors. A token's result is bitwise the same in any batch. Legend:
T tokens, K inputs, M outputs, R rank, S adapter slots.
"""

from __future__ import annotations

import torch
from torch import Tensor

from penstock.kernels.adapters import check_lora
from penstock.kernels.cpu import lora as cpu_lora
from penstock.kernels.cpu.lora import TiledPlan
from penstock.kernels.native.library import function
from penstock.kernels.packing import LoraPlan


def lora_add(y_TM: Tensor, x_TK: Tensor, a_SRK: Tensor, b_SMR: Tensor, scales_S: Tensor, plan: LoraPlan) -> None:
    """See `ops.lora_add`."""
    if not isinstance(plan, TiledPlan) or scales_S.dtype != torch.float32:
        cpu_lora.lora_add(y_TM, x_TK, a_SRK, b_SMR, scales_S, plan)
        return
    check_lora(y_TM, x_TK, a_SRK, b_SMR, scales_S, plan)
    if not len(plan.tiles):
        return
    rank, inputs = a_SRK.shape[1:]
    strides = (x_TK.stride(0), y_TM.stride(0), *a_SRK.stride()[:2], *b_SMR.stride()[:2])
    sizes = torch.tensor((len(plan.tiles), rank, inputs, y_TM.shape[1], *strides))
    scales = scales_S.contiguous()
    tensors = (x_TK, a_SRK, b_SMR, scales, y_TM, plan.order, plan.tiles, sizes)
    function("lora", x_TK.dtype)(*(tensor.data_ptr() for tensor in tensors))
