"""Gated activation of the feed-forward block on the GPU: one read of both halves, one write.

Called through `kernels/ops.py`; knows only tensors. Legend: T tokens, F feed-forward width.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from penstock.kernels import expect
from penstock.kernels.errors import KernelInputError
from penstock.kernels.gpu.aot import AotCase
from penstock.kernels.gpu.tuning import config_for

SILU, GELU_TANH, GELU_ERF = 0, 1, 2
_TANH_SCALE = tl.constexpr(2 * math.sqrt(2 / math.pi))
_SQRT_HALF = tl.constexpr(math.sqrt(0.5))
_WIDE = {torch.float64: tl.float64}


@triton.jit
def gated_kernel(x_ptr, out_ptr, width, x_stride, KIND: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """One token (axis 0) and BLOCK features (axis 1); out is contiguous."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    gate = tl.load(x_ptr + token * x_stride + column, mask=mask, other=0.0).to(WIDE)
    up = tl.load(x_ptr + token * x_stride + width + column, mask=mask, other=0.0).to(WIDE)
    if KIND == 0:
        active = gate / (1 + tl.exp(-gate))
    elif KIND == 1:
        # (1 + tanh(u)) / 2 = 1 / (1 + exp(-2 u)), which needs no tanh and cancels nothing.
        twice = _TANH_SCALE * (gate + 0.044715 * gate * gate * gate)
        active = gate / (1 + tl.exp(-twice))
    else:
        active = gate * 0.5 * (1 + tl.erf(gate * _SQRT_HALF))
    tl.store(out_ptr + token * width + column, (active * up).to(out_ptr.dtype.element_ty), mask=mask)


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """See `ops.silu_and_mul`."""
    return _launch("silu_and_mul", gate_up, SILU)


def gelu_and_mul(gate_up: Tensor) -> Tensor:
    """See `ops.gelu_and_mul`."""
    return _launch("gelu_and_mul", gate_up, GELU_TANH)


def gelu_erf_and_mul(gate_up: Tensor) -> Tensor:
    """See `ops.gelu_erf_and_mul`."""
    return _launch("gelu_erf_and_mul", gate_up, GELU_ERF)


def _launch(op: str, gate_up: Tensor, kind: int) -> Tensor:
    expect.dtype(op, "gate_up", gate_up, *expect.FLOATS)
    if gate_up.dim() == 0 or gate_up.shape[-1] % 2:
        raise KernelInputError(op, "gate_up", f"shape {list(gate_up.shape)}; expected an even last dimension")
    width = gate_up.shape[-1] // 2
    out = torch.empty((*gate_up.shape[:-1], width), dtype=gate_up.dtype, device=gate_up.device)
    if out.numel() == 0:
        return out
    rows = gate_up if gate_up.dim() == 2 and gate_up.stride(-1) == 1 else gate_up.reshape(-1, 2 * width).contiguous()
    config = config_for("gated", {"tokens": len(rows), "width": width}, default_config(width))
    gated_kernel[(len(rows), triton.cdiv(width, config["BLOCK"]))](
        rows,
        out,
        width,
        rows.stride(0),
        KIND=kind,
        BLOCK=config["BLOCK"],
        WIDE=_WIDE.get(gate_up.dtype, tl.float32),
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
    )
    return out


def default_config(width: int) -> dict[str, int]:
    """Eight numbers of each half a thread, as far as the width reaches."""
    block = min(2048, triton.next_power_of_2(width))
    return {"BLOCK": block, "num_warps": max(1, min(8, block // 256)), "num_stages": 1}


def _case(name: str, kind: int, dtype: str, width: int) -> AotCase:
    config = default_config(width)
    signature = {"x_ptr": f"*{dtype}", "out_ptr": f"*{dtype}", "width": "i32", "x_stride": "i32"}
    constexprs = {"KIND": kind, "BLOCK": config["BLOCK"], "WIDE": tl.float32}
    return AotCase(name, gated_kernel, signature, constexprs, config["num_warps"], 1, tuple(signature))


AOT_CASES = (
    _case("silu_bf16", SILU, "bf16", 12288),
    _case("silu_bf16_768", SILU, "bf16", 768),
    _case("gelu_tanh_bf16", GELU_TANH, "bf16", 12288),
    _case("gelu_erf_bf16", GELU_ERF, "bf16", 12288),
    _case("silu_fp32", SILU, "fp32", 3072),
)
