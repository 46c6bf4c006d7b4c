"""Rotary position embedding in every form of pairing, written for plainness.

Called through `kernels/ops.py`; knows only tensors. Legend: T tokens, H heads, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotary(x_THD: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """See `ops.rotary`; computed in the wider of the dtypes."""
    dtype, half = torch.promote_types(x_THD.dtype, cos.dtype), cos.shape[1]
    out = x_THD.to(dtype, copy=True)
    a = slice(0, 2 * half, 2) if interleaved else slice(0, half)
    b = slice(1, 2 * half, 2) if interleaved else slice(half, 2 * half)
    first, second = x_THD[..., a].to(dtype), x_THD[..., b].to(dtype)
    c, s = cos.to(dtype).unsqueeze(1), sin.to(dtype).unsqueeze(1)
    out[..., a], out[..., b] = first * c - second * s, second * c + first * s
    return out.to(x_THD.dtype)
