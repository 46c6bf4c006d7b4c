"""From the joint projection to attention on the GPU: norm and rotation of the heads in place, then the KV is written.

Called through `kernels/ops.py`; knows only tensors and plans. Two launches: the heads never leave registers between
norm and rotation, and keys and values are stored from where they lie. Legend: T tokens, A = Hq + 2 H heads, D head dim.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from penstock.kernels import expect
from penstock.kernels.errors import KernelInputError
from penstock.kernels.gpu.aot import AotCase
from penstock.kernels.gpu.kv_blocks import write_kv
from penstock.kernels.gpu.rotary import default_config
from penstock.kernels.gpu.tuning import config_for
from penstock.kernels.ragged import AttentionPlan

_OP = "rotate_and_store"


@triton.jit
def norm_and_rotate_kernel(
    x_ptr,
    weight_ptr,
    cos_ptr,
    sin_ptr,
    heads,
    stride_t,
    stride_h,
    cos_stride,
    sin_stride,
    eps,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    REST: tl.constexpr,
    HEADS: tl.constexpr,
    WITH_NORM: tl.constexpr,
    WIDE: tl.constexpr,
):
    """HEADS heads of one token, in place; weight [heads, DIM] contiguous. REST as in `rotary.py`."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    pair = tl.arange(0, BLOCK)
    mask = (head < heads)[:, None] & (pair < HALF)[None, :]
    place = x_ptr + token * stride_t + (head * stride_h)[:, None] + pair[None, :]
    first = tl.load(place, mask=mask, other=0.0).to(WIDE)
    second = tl.load(place + HALF, mask=mask, other=0.0).to(WIDE)
    if WITH_NORM:
        squares = tl.sum(first * first + second * second, axis=1)
        own = weight_ptr + (head * DIM)[:, None]
        if REST > 0:
            rest = 2 * HALF + tl.arange(0, REST)[None, :]
            within = (head < heads)[:, None] & (rest < DIM)
            unturned = x_ptr + token * stride_t + (head * stride_h)[:, None] + rest
            kept = tl.load(unturned, mask=within, other=0.0).to(WIDE)
            squares += tl.sum(kept * kept, axis=1)
        scale = tl.rsqrt(squares / DIM + eps)[:, None]
        first = first * scale * tl.load(own + pair[None, :], mask=mask, other=0.0).to(WIDE)
        second = second * scale * tl.load(own + HALF + pair[None, :], mask=mask, other=0.0).to(WIDE)
        if REST > 0:
            kept = kept * scale * tl.load(own + rest, mask=within, other=0.0).to(WIDE)
            tl.store(unturned, kept.to(x_ptr.dtype.element_ty), mask=within)
    cos = tl.load(cos_ptr + token * cos_stride + pair, mask=pair < HALF, other=0.0).to(WIDE)[None, :]
    sin = tl.load(sin_ptr + token * sin_stride + pair, mask=pair < HALF, other=0.0).to(WIDE)[None, :]
    tl.store(place, (first * cos - second * sin).to(x_ptr.dtype.element_ty), mask=mask)
    tl.store(place + HALF, (second * cos + first * sin).to(x_ptr.dtype.element_ty), mask=mask)


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
    kv_heads, dim = kv_BLCHPD.shape[3], kv_BLCHPD.shape[5]
    _check(qkv_TAD, head_norms, cos, sin, kv_heads, dim)
    tokens, heads, _ = qkv_TAD.shape
    turned, half = heads - kv_heads, cos.shape[1]
    cos, sin = (table if table.stride(-1) == 1 else table.contiguous() for table in (cos, sin))
    if tokens:
        key = {"tokens": tokens, "heads": turned, "dim": dim}
        config = config_for(_OP, key, default_config(turned, dim))
        norm_and_rotate_kernel[(tokens, triton.cdiv(turned, config["HEADS"]))](
            qkv_TAD,
            cos if head_norms is None else head_norms.contiguous(),
            cos,
            sin,
            turned,
            qkv_TAD.stride(0),
            qkv_TAD.stride(1),
            cos.stride(0),
            sin.stride(0),
            eps,
            **_sizes(dim, half),
            WITH_NORM=head_norms is not None,
            WIDE=tl.float64 if qkv_TAD.dtype is torch.float64 else tl.float32,
            **config,
        )
    query_heads = heads - 2 * kv_heads
    new_TCHD = qkv_TAD[:, query_heads:].view(tokens, 2, kv_heads, dim)
    write_kv(kv_BLCHPD, layer, new_TCHD, plan)
    return qkv_TAD[:, :query_heads]


def _check(qkv: Tensor, head_norms: Tensor | None, cos: Tensor, sin: Tensor, kv_heads: int, dim: int) -> None:
    expect.dtype(_OP, "qkv_TAD", qkv, *expect.FLOATS)
    expect.shape(_OP, "qkv_TAD", qkv, None, None, dim)
    expect.dense_rows(_OP, "qkv_TAD", qkv)
    expect.at_least(_OP, "qkv_TAD", qkv.shape[1], 2 * kv_heads + 1)
    if head_norms is not None:
        expect.shape(_OP, "head_norms", head_norms, qkv.shape[1] - kv_heads, dim)
        expect.device(_OP, "head_norms", head_norms, qkv)
    for name, table in (("cos", cos), ("sin", sin)):
        expect.shape(_OP, name, table, qkv.shape[0], cos.shape[-1])
        expect.device(_OP, name, table, qkv)
    if not 0 < 2 * cos.shape[1] <= dim:
        raise KernelInputError(_OP, "cos", f"{cos.shape[1]} angles for a head of {dim}")


def _sizes(dim: int, half: int) -> dict[str, int]:
    rest = dim - 2 * half
    block = triton.next_power_of_2(half)
    return {"DIM": dim, "HALF": half, "BLOCK": block, "REST": triton.next_power_of_2(rest) if rest else 0}


def _case(name: str, dtype: str, heads: int, dim: int, *, norm: bool) -> AotCase:
    config = default_config(heads, dim)
    numbers = ("stride_t", "stride_h", "cos_stride", "sin_stride")
    signature = {"x_ptr": f"*{dtype}", **dict.fromkeys(("weight_ptr", "cos_ptr", "sin_ptr"), "*fp32"), "heads": "i32"}
    signature |= {**dict.fromkeys(numbers, "i32"), "eps": "fp32"}
    constexprs = {**_sizes(dim, dim // 2), "HEADS": config["HEADS"], "WITH_NORM": norm, "WIDE": tl.float32}
    aligned = ("x_ptr", "weight_ptr", "cos_ptr", "sin_ptr", *numbers)
    return AotCase(name, norm_and_rotate_kernel, signature, constexprs, config["num_warps"], 1, aligned)


AOT_CASES = (
    _case("normed_bf16_128", "bf16", 40, 128, norm=True),
    _case("plain_bf16_128", "bf16", 40, 128, norm=False),
    _case("normed_bf16_256", "bf16", 12, 256, norm=True),
    _case("plain_bf16_80", "bf16", 64, 80, norm=False),
    _case("normed_fp32_64", "fp32", 12, 64, norm=True),
)
