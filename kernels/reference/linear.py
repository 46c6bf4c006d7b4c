"""Matrix product with a weight, written for plainness; nothing is re-arranged.

Called through `kernels/ops.py`; knows only tensors. Legend: T tokens, K inputs, M outputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from penstock.kernels.packing import PackedWeight


def pack_weight(weight_MK: Tensor, bias: Tensor | None) -> PackedWeight:
    """See `ops.pack_weight`."""
    return PackedWeight(weight_MK, bias, weight_MK.shape[0], weight_MK.shape[1], rearranged=False)


def linear(x_TK: Tensor, packed: PackedWeight) -> Tensor:
    """See `ops.linear`; float32 arithmetic at least."""
    dtype = torch.promote_types(x_TK.dtype, torch.float32)
    bias = None if packed.bias is None else packed.bias.to(dtype)
    return F.linear(x_TK.to(dtype), packed.weight.to(dtype), bias).to(x_TK.dtype)
