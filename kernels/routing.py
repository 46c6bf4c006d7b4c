"""What mixture-of-experts operations demand, said once, and the activations that an expert may have.

Called by the `moe` modules of every backend before they touch memory. Legend: T tokens, E experts, K inputs, F width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from penstock.kernels import expect
from penstock.kernels.errors import KernelInputError
from penstock.kernels.packing import PackedExperts

SCORINGS = ("softmax", "sigmoid")
ACTIVATIONS = ("silu", "gelu")


@dataclass(frozen=True, slots=True)
class Routing:
    """How experts are chosen; the arguments of `ops.route_experts` that are not tensors."""

    top_k: int
    scoring: str
    renormalize: bool
    groups: int
    top_groups: int


def check_routing(logits_TE: Tensor, how: Routing, selection_bias: Tensor | None) -> None:
    """Raises KernelInputError where these arguments cannot be served."""
    op = "route_experts"
    expect.dtype(op, "logits", logits_TE, *expect.FLOATS)
    expect.shape(op, "logits", logits_TE, None, None)
    experts = logits_TE.shape[1]
    if how.scoring not in SCORINGS:
        raise KernelInputError(op, "scoring", f"{how.scoring!r}; expected one of {', '.join(SCORINGS)}")
    if not 1 <= how.top_k <= experts:
        raise KernelInputError(op, "top_k", f"{how.top_k}; expected 1 to {experts}, the number of experts")
    if selection_bias is not None:
        expect.shape(op, "selection_bias", selection_bias, experts)
        expect.dtype(op, "selection_bias", selection_bias, *expect.FLOATS)
        expect.device(op, "selection_bias", selection_bias, logits_TE)
    if how.groups == 0:
        if how.top_groups:
            raise KernelInputError(op, "top_groups", f"{how.top_groups} without groups")
        return
    if how.groups < 0 or experts % how.groups:
        raise KernelInputError(op, "groups", f"{how.groups}; expected a divisor of {experts}")
    if not 1 <= how.top_groups <= how.groups:
        raise KernelInputError(op, "top_groups", f"{how.top_groups}; expected 1 to {how.groups}")
    if how.top_k > how.top_groups * (experts // how.groups):
        raise KernelInputError(op, "top_k", f"{how.top_k}; {how.top_groups} groups hold fewer experts")
    if selection_bias is not None and experts // how.groups < 2:
        raise KernelInputError(op, "groups", "a biased choice takes each group's best two; groups of one have none")


def check_experts(gate_up_EGK: Tensor, down_EKF: Tensor) -> tuple[int, int, int]:
    """(E, F, K) of weights [E, 2 F, K] and [E, K, F], or KernelInputError."""
    op = "pack_experts"
    expect.dtype(op, "gate_up", gate_up_EGK, *expect.FLOATS)
    expect.shape(op, "gate_up", gate_up_EGK, None, None, None)
    experts, double, inputs = gate_up_EGK.shape
    if double % 2:
        raise KernelInputError(op, "gate_up", f"{double} rows; expected gate and up, twice the width")
    for name, size in (("experts", experts), ("width", double // 2), ("inputs", inputs)):
        expect.at_least(op, f"gate_up {name}", size, 1)
    expect.shape(op, "down", down_EKF, experts, inputs, double // 2)
    expect.dtype(op, "down", down_EKF, gate_up_EGK.dtype)
    expect.device(op, "down", down_EKF, gate_up_EGK)
    return experts, double // 2, inputs


def check_moe(x_TK: Tensor, packed: PackedExperts, ids: Tensor, weights: Tensor, activation: str) -> None:
    """Raises KernelInputError where these arguments cannot be served; reads no values."""
    op = "fused_moe"
    expect.dtype(op, "x", x_TK, *expect.FLOATS)
    expect.shape(op, "x", x_TK, None, packed.num_inputs)
    expect.dtype(op, "ids", ids, *expect.INTEGERS)
    expect.shape(op, "ids", ids, x_TK.shape[0], None)
    expect.at_least(op, "ids per token", ids.shape[1], 1)
    expect.shape(op, "weights", weights, *ids.shape)
    expect.dtype(op, "weights", weights, *expect.FLOATS)
    for name, tensor in (("ids", ids), ("weights", weights)):
        expect.device(op, name, tensor, x_TK)
    if activation not in ACTIVATIONS:
        raise KernelInputError(op, "activation", f"{activation!r}; expected one of {', '.join(ACTIVATIONS)}")
    own = packed.gate_up if packed.gate_up is not None else packed.per_expert[0][0].weight
    expect.dtype(op, "x", x_TK, own.dtype)
    expect.device(op, "x", x_TK, own)


def check_ids(ids: Tensor, num_experts: int) -> None:
    """Raises KernelInputError when an id is neither -1 nor an expert; reads values."""
    if ids.numel() and (int(ids.min()) < -1 or int(ids.max()) >= num_experts):
        raise KernelInputError("fused_moe", "ids", f"outside -1 .. {num_experts - 1}")


def check_logits(logits_TE: Tensor) -> None:
    """Raises KernelInputError when a logit is NaN; reads values."""
    if bool(logits_TE.isnan().any()):
        raise KernelInputError("route_experts", "logits", "holds a NaN")


def normalised(weights: Tensor) -> Tensor:
    """Each row over its sum; a row that sums to 0 (every sigmoid underflowed) stays 0."""
    total = weights.sum(dim=-1, keepdim=True)
    return weights / total.masked_fill(total == 0, 1.0)


def rows_by_expert(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Flat rows t * k + j in stable order of their expert, and the expert of each."""
    experts, rows = torch.sort(ids.flatten().to(torch.int64), stable=True)
    return rows, experts
