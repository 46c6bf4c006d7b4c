"""Mixture of experts on the CPU: tokens gathered by expert, one packed product per expert that was hit.

Called through `kernels/ops.py`; knows only tensors.
Legend: T tokens, k experts of a token, E experts, K inputs, F width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from penstock.kernels.cpu.activation import gelu_and_mul, silu_and_mul
from penstock.kernels.cpu.linear import linear, pack_weight
from penstock.kernels.packing import PackedExperts
from penstock.kernels.routing import check_experts, check_ids, check_moe, rows_by_expert


def pack_experts(gate_up_EGK: Tensor, down_EKF: Tensor) -> PackedExperts:
    """See `ops.pack_experts`."""
    experts, width, inputs = check_experts(gate_up_EGK, down_EKF)
    pairs = tuple(
        (pack_weight(gate_up, None), pack_weight(down, None))
        for gate_up, down in zip(gate_up_EGK, down_EKF, strict=True)
    )
    return PackedExperts(experts, width, inputs, None, None, pairs)


def fused_moe(x_TK: Tensor, packed: PackedExperts, ids: Tensor, weights: Tensor, activation: str = "silu") -> Tensor:
    """See `ops.fused_moe`. Every token's terms are summed in float32, in the order of its ids."""
    check_moe(x_TK, packed, ids, weights, activation)
    check_ids(ids, packed.num_experts)
    tokens, chosen = ids.shape
    gated = silu_and_mul if activation == "silu" else gelu_and_mul
    rows, experts = rows_by_expert(ids)
    counts = torch.bincount(experts + 1, minlength=packed.num_experts + 1).tolist()
    flat_weights = weights.flatten().float()
    terms = torch.zeros(tokens * chosen, packed.num_inputs)
    gathered = x_TK[rows // chosen]
    start = counts[0]  # those with no expert come first and add nothing
    for (gate_up, down), count in zip(packed.per_expert, counts[1:], strict=True):
        if count:
            hidden = gated(linear(gathered[start : start + count], gate_up))
            own = rows[start : start + count]
            terms[own] = linear(hidden, down).float() * flat_weights[own, None]
        start += count
    return terms.view(tokens, chosen, packed.num_inputs).sum(dim=1).to(x_TK.dtype)
