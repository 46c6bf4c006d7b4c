"""Rotary position embedding on the CPU: four multiply-adds straight into the result.

Called through `kernels/ops.py`; knows only tensors. Legend: T tokens, H heads, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotary(x_THD: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """See `ops.rotary`. Tables of another dtype than `x` are cast first."""
    half, dim = cos.shape[1], x_THD.shape[-1]
    c, s = cos.to(x_THD.dtype).unsqueeze(1), sin.to(x_THD.dtype).unsqueeze(1)
    a = slice(0, 2 * half, 2) if interleaved else slice(0, half)
    b = slice(1, 2 * half, 2) if interleaved else slice(half, 2 * half)
    first, second = x_THD[..., a], x_THD[..., b]
    out = torch.empty_like(x_THD)
    out_first, out_second = out[..., a], out[..., b]
    torch.mul(first, c, out=out_first)
    out_first.addcmul_(second, s, value=-1)
    torch.mul(second, c, out=out_second)
    out_second.addcmul_(first, s)
    if 2 * half < dim:
        out[..., 2 * half :] = x_THD[..., 2 * half :]
    return out
