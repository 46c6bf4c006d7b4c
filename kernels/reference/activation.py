"""Gated activation of the feed-forward block, written for plainness.

Called through `kernels/ops.py`; knows only tensors. Legend: T tokens, F feed-forward width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """See `ops.silu_and_mul`; float32 arithmetic at least."""
    gate, up = gate_up.to(torch.promote_types(gate_up.dtype, torch.float32)).chunk(2, dim=-1)
    return (gate / (1 + torch.exp(-gate)) * up).to(gate_up.dtype)


def gelu_and_mul(gate_up: Tensor) -> Tensor:
    """See `ops.gelu_and_mul`; float32 arithmetic at least."""
    gate, up = gate_up.to(torch.promote_types(gate_up.dtype, torch.float32)).chunk(2, dim=-1)
    inner = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
    return (gate / 2 * (1 + torch.tanh(inner)) * up).to(gate_up.dtype)


def gelu_erf_and_mul(gate_up: Tensor) -> Tensor:
    """See `ops.gelu_erf_and_mul`; float32 arithmetic at least."""
    gate, up = gate_up.to(torch.promote_types(gate_up.dtype, torch.float32)).chunk(2, dim=-1)
    return (gate / 2 * (1 + torch.erf(gate / math.sqrt(2))) * up).to(gate_up.dtype)
