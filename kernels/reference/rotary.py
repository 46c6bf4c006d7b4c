"""Rotary position embedding in the half-split form, written for plainness.

Called through `kernels/ops.py`; knows only tensors. Legend: T tokens, H heads, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotary(x_THD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See `ops.rotary`; computed in the wider of the dtypes."""
    dtype = torch.promote_types(x_THD.dtype, cos.dtype)
    first, second = x_THD.to(dtype).chunk(2, dim=-1)
    c, s = cos.to(dtype).unsqueeze(1), sin.to(dtype).unsqueeze(1)
    return torch.cat((first * c - second * s, second * c + first * s), dim=-1).to(x_THD.dtype)
