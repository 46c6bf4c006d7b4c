"""Rotary position embedding on the GPU: one token and some heads a program, every form of pairing.

Called through `kernels/ops.py`; knows only tensors. How positions become angles (linear, Llama 3, YaRN scaling) is in
the tables that it is given. Legend: T tokens, H heads, D head dim, R rotated dimensions.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from penstock.kernels import expect
from penstock.kernels.errors import KernelInputError
from penstock.kernels.gpu.aot import AotCase
from penstock.kernels.gpu.tuning import config_for

_TILE = 2048


@triton.jit
def rotary_kernel(
    x_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    heads,
    x_stride_t,
    x_stride_h,
    cos_stride,
    sin_stride,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    REST: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    WIDE: tl.constexpr,
):
    """HALF pairs are rotated, REST (a power of two) covers the dimensions that are only copied; 0: there are none."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    pair = tl.arange(0, BLOCK)
    x_row = x_ptr + token * x_stride_t + (head * x_stride_h)[:, None]
    out_row = out_ptr + token * heads * DIM + (head * DIM)[:, None]
    cos = tl.load(cos_ptr + token * cos_stride + pair, mask=pair < HALF, other=0.0).to(WIDE)[None, :]
    sin = tl.load(sin_ptr + token * sin_stride + pair, mask=pair < HALF, other=0.0).to(WIDE)[None, :]
    if INTERLEAVED:
        both = tl.arange(0, 2 * BLOCK)[None, :]
        mask = (head < heads)[:, None] & (both < 2 * HALF)
        x = tl.load(x_row + both, mask=mask, other=0.0).to(WIDE)
        first, second = tl.split(tl.reshape(x, (HEADS, BLOCK, 2)))
        turned = tl.join(first * cos - second * sin, second * cos + first * sin)
        result = tl.reshape(turned, (HEADS, 2 * BLOCK))
        tl.store(out_row + both, result.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        mask = (head < heads)[:, None] & (pair < HALF)[None, :]
        first = tl.load(x_row + pair[None, :], mask=mask, other=0.0).to(WIDE)
        second = tl.load(x_row + HALF + pair[None, :], mask=mask, other=0.0).to(WIDE)
        tl.store(out_row + pair[None, :], (first * cos - second * sin).to(out_ptr.dtype.element_ty), mask=mask)
        tl.store(out_row + HALF + pair[None, :], (second * cos + first * sin).to(out_ptr.dtype.element_ty), mask=mask)
    if REST > 0:
        rest = 2 * HALF + tl.arange(0, REST)[None, :]
        mask = (head < heads)[:, None] & (rest < DIM)
        tl.store(out_row + rest, tl.load(x_row + rest, mask=mask, other=0.0), mask=mask)


def rotary(x_THD: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """See `ops.rotary`; float32 arithmetic at least."""
    _check(x_THD, cos, sin)
    tokens, heads, dim = x_THD.shape
    half = cos.shape[1]
    out = torch.empty(x_THD.shape, dtype=x_THD.dtype, device=x_THD.device)
    if out.numel() == 0:
        return out
    x = x_THD if x_THD.stride(-1) == 1 else x_THD.contiguous()
    cos, sin = (table if table.stride(-1) == 1 else table.contiguous() for table in (cos, sin))
    config = config_for("rotary", {"tokens": tokens, "heads": heads, "dim": dim}, default_config(heads, dim))
    wide = tl.float64 if torch.float64 in (x.dtype, cos.dtype) else tl.float32
    rotary_kernel[(tokens, triton.cdiv(heads, config["HEADS"]))](
        x,
        cos,
        sin,
        out,
        heads,
        x.stride(0),
        x.stride(1),
        cos.stride(0),
        sin.stride(0),
        **_sizes(dim, half, config["HEADS"]),
        INTERLEAVED=interleaved,
        WIDE=wide,
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
    )
    return out


def _check(x_THD: Tensor, cos: Tensor, sin: Tensor) -> None:
    expect.shape("rotary", "x_THD", x_THD, None, None, None)
    expect.dtype("rotary", "x_THD", x_THD, *expect.FLOATS)
    for name, table in (("cos", cos), ("sin", sin)):
        expect.shape("rotary", name, table, x_THD.shape[0], None)
        expect.dtype("rotary", name, table, *expect.FLOATS)
        expect.device("rotary", name, table, x_THD)
    expect.shape("rotary", "sin", sin, *cos.shape)
    if not 0 < 2 * cos.shape[1] <= x_THD.shape[2]:
        raise KernelInputError("rotary", "cos", f"{cos.shape[1]} angles for a head of {x_THD.shape[2]}")


def _sizes(dim: int, half: int, heads: int) -> dict[str, int]:
    rest = dim - 2 * half
    return {
        "DIM": dim,
        "HALF": half,
        "HEADS": heads,
        "BLOCK": triton.next_power_of_2(half),
        "REST": triton.next_power_of_2(rest) if rest else 0,
    }


def default_config(heads: int, dim: int) -> dict[str, int]:
    """As many heads a program as make a tile of about _TILE numbers."""
    block = triton.next_power_of_2(dim)
    per_program = max(1, min(triton.next_power_of_2(heads), _TILE // block))
    return {"HEADS": per_program, "num_warps": max(1, min(4, per_program * block // 256)), "num_stages": 1}


def _case(name: str, dtype: str, heads: int, dim: int, half: int, interleaved: bool) -> AotCase:
    config = default_config(heads, dim)
    numbers = ("heads", "x_stride_t", "x_stride_h", "cos_stride", "sin_stride")
    signature = {"x_ptr": f"*{dtype}", "cos_ptr": "*fp32", "sin_ptr": "*fp32", "out_ptr": f"*{dtype}"}
    signature |= dict.fromkeys(numbers, "i32")
    constexprs = {**_sizes(dim, half, config["HEADS"]), "INTERLEAVED": interleaved, "WIDE": tl.float32}
    aligned = tuple(each for each in signature if each != "heads")
    return AotCase(name, rotary_kernel, signature, constexprs, config["num_warps"], 1, aligned)


AOT_CASES = (
    _case("half_split_bf16_128", "bf16", 40, 128, 64, False),
    _case("half_split_bf16_80", "bf16", 32, 80, 40, False),
    _case("half_split_bf16_256", "bf16", 8, 256, 128, False),
    _case("half_split_fp32_64", "fp32", 12, 64, 32, False),
    _case("interleaved_bf16_128", "bf16", 40, 128, 64, True),
    _case("partial_bf16_128", "bf16", 40, 128, 32, False),
    _case("partial_interleaved_bf16_128", "bf16", 40, 128, 32, True),
)
