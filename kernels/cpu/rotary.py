"""Rotary position embedding on the CPU: four multiply-adds straight into the result.

Called through `kernels/ops.py`; knows only tensors. Legend: T tokens, H heads, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotary(x_THD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See `ops.rotary`. Tables of another dtype than `x` are cast first."""
    half = x_THD.shape[-1] // 2
    c, s = cos.to(x_THD.dtype).unsqueeze(1), sin.to(x_THD.dtype).unsqueeze(1)
    first, second = x_THD[..., :half], x_THD[..., half:]
    out = torch.empty_like(x_THD)
    out_first, out_second = out[..., :half], out[..., half:]
    torch.mul(first, c, out=out_first)
    out_first.addcmul_(second, s, value=-1)
    torch.mul(second, c, out=out_second)
    out_second.addcmul_(first, s)
    return out
