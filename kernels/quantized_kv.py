"""8-bit keys and values in torch: the definition of both formats, and what a CPU makes of them.

Called by `reference/` and `cpu/`. A stored code stands for code * scale with one scale per layer, key or value, and kv
head, fixed before serving (Noune et al. 2022, "8-bit numerical formats for deep neural networks", section 3).
Legend: L layers, C = 2 (key, value), H kv heads, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

MOST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}


def is_quantized(kv: Tensor) -> bool:
    """Whether a storage holds codes."""
    return kv.dtype in MOST


def bits(kv: Tensor) -> Tensor:
    """The storage in a dtype that can be indexed; torch cannot index 8-bit floats."""
    return kv.view(torch.uint8) if kv.dtype == torch.float8_e4m3fn else kv


def decode(picked: Tensor, dtype: torch.dtype, kv: Tensor) -> Tensor:
    """Numbers picked from `bits(kv)`, as `dtype`; exact."""
    return (picked.view(kv.dtype) if kv.dtype == torch.float8_e4m3fn else picked).to(dtype)


def encode(new_TCHD: Tensor, scales_CH: Tensor, dtype: torch.dtype) -> Tensor:
    """The codes nearest to new / scale, ties to even, saturated; NaN becomes 0. The division is in float32."""
    ratio = torch.nan_to_num(new_TCHD.float() / scales_CH[:, :, None], nan=0.0, posinf=MOST[dtype], neginf=-MOST[dtype])
    ratio = ratio.clamp(-MOST[dtype], MOST[dtype])
    return ratio.round().to(dtype) if dtype == torch.int8 else ratio.to(dtype)
