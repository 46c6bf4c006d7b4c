"""Matrix product on the CPU: weights are put into oneDNN's blocked order once, at load.

Without it oneDNN re-orders the weight in every call, which costs as much as the product itself when few tokens are
computed (decode). Where oneDNN does not take the dtype, torch's own product on the plain weight is used.
Called through `kernels/ops.py`; knows only tensors. Legend: T tokens, K inputs, M outputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from penstock.kernels.packing import PackedWeight

# The order is chosen for about this many tokens; measured to serve 1 to 512 well.
_TYPICAL_TOKENS = 32


def _onednn_takes(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]  # torch gives it no types
        return False
    if dtype is torch.float32:
        return True
    if dtype is torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return False


def pack_weight(weight_MK: Tensor, bias: Tensor | None) -> PackedWeight:
    """See `ops.pack_weight`."""
    outputs, inputs = weight_MK.shape
    if not _onednn_takes(weight_MK.dtype):
        return PackedWeight(weight_MK.contiguous(), bias, outputs, inputs, rearranged=False)
    blocked: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight_MK.contiguous(), _TYPICAL_TOKENS)
    return PackedWeight(blocked, bias, outputs, inputs, rearranged=True)


def linear(x_TK: Tensor, packed: PackedWeight) -> Tensor:
    """See `ops.linear`."""
    if not packed.rearranged:
        return F.linear(x_TK, packed.weight, packed.bias)
    out: Tensor = torch.ops.mkldnn._linear_pointwise.default(x_TK, packed.weight, packed.bias, "none", [], "")
    return out
