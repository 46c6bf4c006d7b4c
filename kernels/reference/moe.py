"""Mixture of experts, written for plainness: a loop over experts, every token's sum taken in its own order.

Called through `kernels/ops.py`; knows only tensors.
Legend: T tokens, k experts of a token, E experts, K inputs, F width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from penstock.kernels.packing import PackedExperts
from penstock.kernels.routing import Routing, check_experts, check_ids, check_moe, check_routing, normalised


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
    """See `ops.route_experts`; float32 arithmetic at least."""
    how = Routing(top_k, scoring, renormalize, groups, top_groups)
    check_routing(logits_TE, how, selection_bias)
    logits = logits_TE.to(torch.promote_types(logits_TE.dtype, torch.float32))
    scores = logits.softmax(dim=-1) if scoring == "softmax" else logits.sigmoid()
    # Both scorings keep the order of the logits, which have no ties by rounding.
    merit = logits if selection_bias is None else scores + selection_bias.to(scores.dtype)
    merit = merit.masked_fill(merit.isnan(), -torch.inf)
    barred = _outside_best_groups(merit, how, biased=selection_bias is not None)
    order = torch.sort(merit, dim=-1, descending=True, stable=True).indices
    # Stable again: those barred go last, the others keep their order.
    last = torch.sort(barred.gather(-1, order).to(torch.int8), dim=-1, stable=True).indices
    ids = order.gather(-1, last)[:, :top_k]
    weights = scores.gather(-1, ids)
    if renormalize:
        weights = normalised(weights)
    weights = weights.masked_fill(logits.isnan().any(dim=-1, keepdim=True), torch.nan)
    return ids.to(torch.int32), (weights * scaling).float()


def _outside_best_groups(merit: Tensor, how: Routing, biased: bool) -> Tensor:
    """[T, E] true where an expert's group is not among the best; ties go to the lower group."""
    if not how.groups:
        return torch.zeros_like(merit, dtype=torch.bool)
    tokens, experts = merit.shape
    members = merit.view(tokens, how.groups, experts // how.groups)
    best = members.topk(2, dim=-1).values.sum(dim=-1) if biased else members.amax(dim=-1)
    chosen = torch.sort(best, dim=-1, descending=True, stable=True).indices[:, : how.top_groups]
    outside = torch.ones_like(best, dtype=torch.bool).scatter_(1, chosen, value=False)
    return outside.repeat_interleave(experts // how.groups, dim=1)


def pack_experts(gate_up_EGK: Tensor, down_EKF: Tensor) -> PackedExperts:
    """See `ops.pack_experts`."""
    experts, width, inputs = check_experts(gate_up_EGK, down_EKF)
    return PackedExperts(experts, width, inputs, gate_up_EGK, down_EKF)


def fused_moe(x_TK: Tensor, packed: PackedExperts, ids: Tensor, weights: Tensor, activation: str = "silu") -> Tensor:
    """See `ops.fused_moe`; float32 arithmetic at least, nothing rounded in between."""
    check_moe(x_TK, packed, ids, weights, activation)
    check_ids(ids, packed.num_experts)
    if packed.gate_up is None or packed.down is None:
        raise TypeError("these experts were packed by another backend")
    dtype = torch.promote_types(x_TK.dtype, torch.float32)
    x = x_TK.to(dtype)
    terms = x.new_zeros(*ids.shape, packed.num_inputs)
    for expert in range(packed.num_experts):
        token, place = torch.nonzero(ids == expert, as_tuple=True)
        gate, up = (x[token] @ packed.gate_up[expert].to(dtype).t()).chunk(2, dim=-1)
        hidden = (F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")) * up
        terms[token, place] = hidden @ packed.down[expert].to(dtype).t() * weights[token, place, None].to(dtype)
    return terms.sum(dim=1).to(x_TK.dtype)
