"""Gated activation of the feed-forward block on the CPU.

Called through `kernels/ops.py`; knows only tensors. Legend: T tokens, F feed-forward width.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """See `ops.silu_and_mul`."""
    width = gate_up.shape[-1] // 2
    return F.silu(gate_up[..., :width]).mul_(gate_up[..., width:])


def gelu_and_mul(gate_up: Tensor) -> Tensor:
    """See `ops.gelu_and_mul`."""
    width = gate_up.shape[-1] // 2
    return F.gelu(gate_up[..., :width], approximate="tanh").mul_(gate_up[..., width:])


def gelu_erf_and_mul(gate_up: Tensor) -> Tensor:
    """See `ops.gelu_erf_and_mul`."""
    width = gate_up.shape[-1] // 2
    return F.gelu(gate_up[..., :width]).mul_(gate_up[..., width:])
