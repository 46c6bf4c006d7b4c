"""Mixture of experts on the CPU over packed panels, experts side by side; see `moe.cpp`.

Called through `kernels/ops.py`; knows only tensors.
Legend: T tokens, k experts of a token, E experts, K inputs, F width.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from penstock.kernels.cpu import moe as cpu_moe
from penstock.kernels.native.library import function
from penstock.kernels.native.linear import pack_panels, panel_numbers
from penstock.kernels.packing import PackedExperts
from penstock.kernels.routing import check_experts, check_ids, check_moe, rows_by_expert


class _Experts(ctypes.Structure):
    _fields_ = (
        ("order", ctypes.c_void_p),
        ("offsets", ctypes.c_void_p),
        ("num_experts", ctypes.c_int64),
        ("chosen", ctypes.c_int64),
        ("tokens", ctypes.c_int64),
        ("inputs", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("gelu", ctypes.c_int),
    )


@dataclass(frozen=True, slots=True, eq=False)
class PanelExperts(PackedExperts):
    """`gate_up` and `down` hold each expert's panels after the other's, as `PanelWeight` does for one weight."""


def pack_experts(gate_up_EGK: Tensor, down_EKF: Tensor) -> PackedExperts:
    """See `ops.pack_experts`. Odd numbers of bfloat16 inputs have no whole words and are left to torch."""
    experts, width, inputs = check_experts(gate_up_EGK, down_EKF)
    if inputs * gate_up_EGK.element_size() % 4 or width * gate_up_EGK.element_size() % 4:
        return cpu_moe.pack_experts(gate_up_EGK, down_EKF)
    return PanelExperts(experts, width, inputs, _panels(gate_up_EGK), _panels(down_EKF))


def _panels(weights_EMK: Tensor) -> Tensor:
    panels = torch.empty(len(weights_EMK), panel_numbers(*weights_EMK.shape[1:]), dtype=weights_EMK.dtype)
    for weight, target in zip(weights_EMK, panels, strict=True):
        pack_panels(weight, target)
    return panels


def fused_moe(x_TK: Tensor, packed: PackedExperts, ids: Tensor, weights: Tensor, activation: str = "silu") -> Tensor:
    """See `ops.fused_moe`."""
    if not isinstance(packed, PanelExperts) or packed.gate_up is None or packed.down is None:
        return cpu_moe.fused_moe(x_TK, packed, ids, weights, activation)
    check_moe(x_TK, packed, ids, weights, activation)
    check_ids(ids, packed.num_experts)
    tokens, chosen = ids.shape
    x_TK, weights = x_TK.contiguous(), weights.float().contiguous()
    order, experts = rows_by_expert(ids)
    offsets = torch.searchsorted(experts, torch.arange(packed.num_experts + 1))
    routed = tokens * chosen
    hidden = torch.empty(routed, 2 * packed.width, dtype=x_TK.dtype)
    gated = torch.empty(routed, packed.width, dtype=x_TK.dtype)
    terms = torch.empty(routed, packed.num_inputs)
    out = torch.empty_like(x_TK)
    how = _Experts(
        order.data_ptr(),
        offsets.data_ptr(),
        packed.num_experts,
        chosen,
        tokens,
        packed.num_inputs,
        packed.width,
        activation == "gelu",
    )
    function("moe", x_TK.dtype)(
        x_TK.data_ptr(),
        packed.gate_up.data_ptr(),
        packed.down.data_ptr(),
        weights.data_ptr(),
        ctypes.addressof(how),
        hidden.data_ptr(),
        gated.data_ptr(),
        terms.data_ptr(),
        out.data_ptr(),
    )
    return out
