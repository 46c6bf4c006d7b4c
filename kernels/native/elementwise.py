"""Norms, gated activations, and the way from the projection to the KV blocks in one pass; see `elementwise.cpp`.

Called through `kernels/ops.py`; knows only tensors. Legend: T tokens, A = Hq + 2 H heads (query, key, value), D head
dim, E features, F feed-forward width, B blocks, L layers, C = 2 (key, value), P slots.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor

from penstock.kernels import expect
from penstock.kernels.cpu import activation as cpu_activation
from penstock.kernels.cpu import norm as cpu_norm
from penstock.kernels.errors import KernelInputError
from penstock.kernels.native.attention import own_plan
from penstock.kernels.native.library import function
from penstock.kernels.ragged import AttentionPlan

_SILU, _GELU_TANH = 0, 1


class _Heads(ctypes.Structure):
    _fields_ = (
        ("query_heads", ctypes.c_int64),
        ("kv_heads", ctypes.c_int64),
        ("dim", ctypes.c_int64),
        ("block_stride", ctypes.c_int64),
        ("part_stride", ctypes.c_int64),
        ("slots", ctypes.c_int64),
        ("eps", ctypes.c_float),
    )


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `ops.rms_norm`."""
    if weight.dim() != 1 or not x.is_contiguous() or not _serves(x, weight):
        return cpu_norm.rms_norm(x, weight, eps)
    out = torch.empty_like(x)
    rows = x.numel() // weight.shape[0]
    _norm(x, weight)(x.data_ptr(), 0, weight.data_ptr(), out.data_ptr(), 0, rows, weight.shape[0], eps)
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `ops.add_rms_norm`."""
    whole = x.is_contiguous() and residual.is_contiguous() and x.shape == residual.shape
    if weight.dim() != 1 or not whole or residual.dtype != x.dtype or not _serves(x, weight):
        return cpu_norm.add_rms_norm(x, residual, weight, eps)
    out, total = torch.empty_like(x), torch.empty_like(x)
    rows = x.numel() // weight.shape[0]
    _norm(x, weight)(
        x.data_ptr(),
        residual.data_ptr(),
        weight.data_ptr(),
        out.data_ptr(),
        total.data_ptr(),
        rows,
        weight.shape[0],
        eps,
    )
    return out, total


def _serves(x: Tensor, weight: Tensor) -> bool:
    return (
        x.shape[-1] == weight.shape[0] > 0
        and weight.is_contiguous()
        and (weight.dtype == x.dtype or weight.dtype is torch.float32)
    )


def _norm(x: Tensor, weight: Tensor) -> Callable[..., None]:
    return function("norm" if weight.dtype == x.dtype else "norm_wide", x.dtype)


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """See `ops.silu_and_mul`."""
    return _gate(gate_up, _SILU) if gate_up.is_contiguous() else cpu_activation.silu_and_mul(gate_up)


def gelu_and_mul(gate_up: Tensor) -> Tensor:
    """See `ops.gelu_and_mul`."""
    return _gate(gate_up, _GELU_TANH) if gate_up.is_contiguous() else cpu_activation.gelu_and_mul(gate_up)


def _gate(gate_up: Tensor, kind: int) -> Tensor:
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(rows, width, dtype=gate_up.dtype)
    function("gate", gate_up.dtype)(gate_up.data_ptr(), out.data_ptr(), rows, width, kind)
    return out


def rotate_and_store(
    qkv_TAD: Tensor,
    head_norms: Tensor | None,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    kv_BLCHPD: Tensor,
    layer: int,
    plan: AttentionPlan,
) -> Tensor:
    """See `ops.rotate_and_store`."""
    _, layers, parts, kv_heads, slots, dim = kv_BLCHPD.shape
    tokens, heads, _ = qkv_TAD.shape
    places = own_plan(plan).places
    _check_heads(qkv_TAD, kv_BLCHPD, layer, len(places))
    qkv_TAD = qkv_TAD.contiguous()
    cos, sin = (table.to(torch.float32).contiguous() for table in (cos, sin))
    norms = 0
    if head_norms is not None:
        head_norms = head_norms.to(torch.float32).contiguous()
        expect.shape("rotate_and_store", "head_norms", head_norms, heads - kv_heads, dim)
        norms = head_norms.data_ptr()
    for name, table in (("cos", cos), ("sin", sin)):
        expect.shape("rotate_and_store", name, table, tokens, dim // 2)
    part = kv_heads * slots * dim
    shape = _Heads(heads - 2 * kv_heads, kv_heads, dim, layers * parts * part, part, slots, eps)
    function("rotate_and_store", qkv_TAD.dtype)(
        qkv_TAD.data_ptr(),
        kv_BLCHPD.data_ptr() + layer * parts * part * kv_BLCHPD.element_size(),
        norms,
        cos.data_ptr(),
        sin.data_ptr(),
        places.data_ptr(),
        tokens,
        ctypes.addressof(shape),
    )
    return qkv_TAD[:, : heads - 2 * kv_heads]


def _check_heads(qkv_TAD: Tensor, kv_BLCHPD: Tensor, layer: int, planned: int) -> None:
    """Demand what the C side takes for granted."""
    op, (_, layers, parts, kv_heads, _, dim) = "rotate_and_store", kv_BLCHPD.shape
    if parts != 2:
        raise KernelInputError(op, "kv", f"shape {list(kv_BLCHPD.shape)}; expected keys and values, [B, L, 2, H, P, D]")
    expect.dtype(op, "qkv", qkv_TAD, kv_BLCHPD.dtype)
    expect.shape(op, "qkv", qkv_TAD, planned, None, dim)
    if dim % 2 or qkv_TAD.shape[1] <= 2 * kv_heads:
        raise KernelInputError(op, "qkv", f"{qkv_TAD.shape[1]} heads of {dim} beside {kv_heads} of keys and of values")
    if not 0 <= layer < layers or not kv_BLCHPD.is_contiguous():
        raise KernelInputError(op, "kv", f"layer {layer} of {layers}, or not contiguous")
