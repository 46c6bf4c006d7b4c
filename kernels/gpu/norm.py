"""RMS norm on the GPU: several rows a program, one read and one write of everything.

Called through `kernels/ops.py`; knows only tensors. Legend: T rows, H heads, D features.
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

WIDEST = 1 << 16
_TILE = 2048
_MANY_ROWS = 4096
_WIDE = {torch.float64: tl.float64}


@triton.jit(do_not_specialize=["rows"])
def rms_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    total_ptr,
    rows,
    heads,
    x_stride_t,
    x_stride_h,
    residual_stride_t,
    weight_stride_h,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    WITH_RESIDUAL: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Rows of x [T, H, D] in one row order; out and total are contiguous. With a residual, H is 1."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    mask = (row < rows)[:, None] & (column < WIDTH)[None, :]
    token, head = row // heads, row % heads
    x = tl.load(x_ptr + (token * x_stride_t + head * x_stride_h)[:, None] + column[None, :], mask=mask, other=0.0)
    flat = row[:, None] * WIDTH + column[None, :]
    if WITH_RESIDUAL:
        residual = tl.load(residual_ptr + (token * residual_stride_t)[:, None] + column[None, :], mask=mask, other=0.0)
        # The sum is rounded to the stored dtype first: the norm is of what the next layer will read.
        x = (x.to(WIDE) + residual.to(WIDE)).to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + flat, x, mask=mask)
    wide = x.to(WIDE)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=1) / WIDTH + eps)
    weight = tl.load(weight_ptr + (head * weight_stride_h)[:, None] + column[None, :], mask=mask, other=0.0)
    tl.store(out_ptr + flat, (wide * scale[:, None] * weight.to(WIDE)).to(out_ptr.dtype.element_ty), mask=mask)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `ops.rms_norm`."""
    _check("rms_norm", x, weight)
    if weight.dim() == 2:
        return _launch(x, None, weight, eps)[0]
    return _launch(x.unsqueeze(0) if x.dim() == 1 else x, None, weight, eps)[0].view(x.shape)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `ops.add_rms_norm`."""
    _check("add_rms_norm", x, weight)
    expect.shape("add_rms_norm", "residual", residual, *x.shape)
    expect.dtype("add_rms_norm", "residual", residual, x.dtype)
    expect.device("add_rms_norm", "residual", residual, x)
    if weight.dim() != 1:
        total = x + residual
        return rms_norm(total, weight, eps), total
    out, total = _launch(x, residual, weight, eps)
    return out.view(x.shape), total.view(x.shape)


def _check(op: str, x: Tensor, weight: Tensor) -> None:
    expect.dtype(op, "x", x, *expect.FLOATS)
    if x.dim() == 0 or not 0 < x.shape[-1] <= WIDEST:
        raise KernelInputError(op, "x", f"shape {list(x.shape)}; expected 1 to {WIDEST} features")
    expect.dtype(op, "weight", weight, *expect.FLOATS)
    expect.device(op, "weight", weight, x)
    if weight.dim() == 2 and x.dim() >= 2:
        expect.shape(op, "weight", weight, x.shape[-2], x.shape[-1])
    else:
        expect.shape(op, "weight", weight, x.shape[-1])


def _launch(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = out if residual is None else torch.empty_like(out)
    x_THD = _as_rows(x, keep_heads=residual is None)
    residual_TD = x_THD[:, 0] if residual is None else _as_rows(residual, keep_heads=False)[:, 0]
    heads, width = x_THD.shape[1:]
    rows = x_THD.shape[0] * heads
    if rows == 0:
        return out, total
    block = triton.next_power_of_2(width)
    config = config_for("rms_norm", {"rows": rows, "width": width}, default_config(rows, width))
    dense = weight if weight.stride(-1) == 1 or width == 1 else weight.contiguous()
    rms_norm_kernel[(triton.cdiv(rows, config["ROWS"]),)](
        x_THD,
        residual_TD,
        dense,
        out,
        total,
        rows,
        heads,
        x_THD.stride(0),
        x_THD.stride(1),
        residual_TD.stride(0),
        dense.stride(0) if dense.dim() == 2 else 0,
        eps,
        WIDTH=width,
        BLOCK=block,
        ROWS=config["ROWS"],
        WITH_RESIDUAL=residual is not None,
        WIDE=_WIDE.get(x.dtype, tl.float32),
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
    )
    return out, total


def _as_rows(x: Tensor, *, keep_heads: bool) -> Tensor:
    """[T, H, D] with neighbours in D adjacent; a view where the strides allow one."""
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        x = x.contiguous()
    if x.dim() == 3 and keep_heads:
        return x
    if x.dim() == 2:
        return x.unsqueeze(1)
    heads = x.shape[-2] if keep_heads and x.dim() > 2 else 1
    return x.reshape(-1, heads, x.shape[-1])


def default_config(rows: int, width: int) -> dict[str, int]:
    """A program reads about _TILE numbers, or one row where rows are few: two variants a width, not one a batch."""
    block = triton.next_power_of_2(width)
    per_program = max(1, _TILE // block) if rows >= _MANY_ROWS else 1
    return {"ROWS": per_program, "num_warps": min(16, max(1, per_program * block // 512)), "num_stages": 1}


def _case(name: str, dtype: str, weight: str, rows: int, width: int, residual: bool) -> AotCase:
    config = default_config(rows, width)
    signature = {
        **{f"{each}_ptr": f"*{dtype}" for each in ("x", "residual", "out", "total")},
        "weight_ptr": f"*{weight}",
        **dict.fromkeys(("rows", "heads"), "i32"),
        **dict.fromkeys(("x_stride_t", "x_stride_h", "residual_stride_t", "weight_stride_h"), "i32"),
        "eps": "fp32",
    }
    constexprs = {
        "WIDTH": width,
        "BLOCK": triton.next_power_of_2(width),
        "ROWS": config["ROWS"],
        "WITH_RESIDUAL": residual,
        "WIDE": tl.float32,
    }
    pointers = tuple(each for each, kind in signature.items() if kind.startswith("*"))
    strides = ("x_stride_t", "x_stride_h", "residual_stride_t", "weight_stride_h")
    return AotCase(name, rms_norm_kernel, signature, constexprs, config["num_warps"], 1, (*pointers, *strides))


AOT_CASES = (
    *(_case(f"add_bf16_{width}", "bf16", "bf16", 4096, width, True) for width in (1024, 2048, 4096, 5120)),
    _case("bf16_4096_one_row", "bf16", "bf16", 1, 4096, False),
    _case("bf16_16384", "bf16", "bf16", 4096, 16384, False),
    _case("heads_bf16_128", "bf16", "bf16", 65536, 128, False),
    _case("heads_bf16_80", "bf16", "bf16", 65536, 80, False),
    _case("bf16_fp32_weight_2304", "bf16", "fp32", 4096, 2304, False),
    _case("add_fp32_1024", "fp32", "fp32", 4096, 1024, True),
    _case("add_fp16_4096", "fp16", "fp16", 4096, 4096, True),
)
