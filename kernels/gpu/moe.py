"""Mixture of experts on the GPU: choose, sort by expert, two grouped products, sum.

Called through `kernels/ops.py`; knows only tensors. After the fused form of Gale et al. 2023 (MegaBlocks, section 5):
no capacity, no dropped token, no padding beyond a tile. Sizes are read on the device, so a captured graph replays.
Legend: T tokens, k experts of a token, E experts, K inputs, F width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from penstock.kernels import expect
from penstock.kernels.gpu import moe_gemm, moe_routing
from penstock.kernels.gpu.moe_alignment import align
from penstock.kernels.gpu.tuning import config_for
from penstock.kernels.packing import PackedExperts
from penstock.kernels.routing import Routing, check_experts, check_moe, check_routing


def route_experts(
    logits_TE: Tensor,
    top_k: int,
    *,
    scoring: str = "softmax",
    renormalize: bool = True,
    selection_bias: Tensor | None = None,
    groups: int = 0,
    top_groups: int = 0,
    scaling: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """See `ops.route_experts`."""
    how = Routing(top_k, scoring, renormalize, groups, top_groups)
    check_routing(logits_TE, how, selection_bias)
    logits = logits_TE if logits_TE.stride(-1) == 1 else logits_TE.contiguous()
    return moe_routing.route(logits, how, selection_bias, scaling)


def pack_experts(gate_up_EGK: Tensor, down_EKF: Tensor) -> PackedExperts:
    """See `ops.pack_experts`; the weights keep their order."""
    experts, width, inputs = check_experts(gate_up_EGK, down_EKF)
    return PackedExperts(experts, width, inputs, gate_up_EGK.contiguous(), down_EKF.contiguous())


def fused_moe(x_TK: Tensor, packed: PackedExperts, ids: Tensor, weights: Tensor, activation: str = "silu") -> Tensor:
    """See `ops.fused_moe`."""
    check_moe(x_TK, packed, ids, weights, activation)
    expect.dtype("fused_moe", "x", x_TK, torch.float32, torch.bfloat16, torch.float16)
    if packed.gate_up is None or packed.down is None:
        raise TypeError("these experts were packed by another backend")
    tokens, chosen = ids.shape
    out = x_TK.new_empty(tokens, packed.num_inputs)
    if not tokens:
        return out
    key = {"T": tokens, "E": packed.num_experts, "top_k": chosen, "F": packed.width, "K": packed.num_inputs}
    default = moe_gemm.default_config(ids.numel(), packed.num_experts, x_TK.element_size())
    config = config_for("moe", key, default)
    x, ids = x_TK if x_TK.stride(-1) == 1 else x_TK.contiguous(), ids.contiguous()
    blocks = align(ids, packed.num_experts, config["BLOCK_T"])
    hidden = moe_gemm.gate_up(x, packed.gate_up, blocks, chosen, activation == "gelu", config)
    terms = moe_gemm.down(hidden, packed.down, weights.contiguous(), blocks, config)
    moe_gemm.sum_terms(terms, ids, out, packed.num_experts)
    return out
