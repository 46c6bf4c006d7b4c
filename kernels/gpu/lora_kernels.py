"""The two halves of a low-rank update on the GPU, for tiles of tokens that share an adapter and for single tokens.

Launched by `lora`. The first half (shrink) reads long rows of the adapter, so K is split over programs that each leave
float32 sums; the second half (expand) adds those in order and adds the change to y. Sums and the vector between the
halves stay float32: for bfloat16 the tensor cores take it as two numbers, its rounding and what that left over.
Legend: T tokens, K inputs, M outputs, R rank, S adapter slots.
"""

from __future__ import annotations

import triton
import triton.language as tl

from penstock.kernels.gpu.aot import AotCase
from penstock.kernels.gpu.matrix_tiles import dot

# Rows of the table that a plan is: see `lora.DevicePlan`.
ORDER, TILE_SLOT, TILE_START, TILE_COUNT, SLOT, TABLE_ROWS = range(6)
_ORDER, _TILE_SLOT, _TILE_START = tl.constexpr(ORDER), tl.constexpr(TILE_SLOT), tl.constexpr(TILE_START)
_TILE_COUNT, _SLOT = tl.constexpr(TILE_COUNT), tl.constexpr(SLOT)


@triton.jit(do_not_specialize=["T"])
def shrink_tiles_kernel(
    x,
    a,
    sums,
    table,
    T,
    S,
    R,
    K,
    stride_x,
    stride_as,
    stride_ar,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
):
    """sums[split, t, r] = sum over the split's k of x[t, k] a[slot, r, k], for the tokens of one tile."""
    tile, split = tl.program_id(0), tl.program_id(1)
    slot = tl.load(table + _TILE_SLOT * T + tile).to(tl.int64)
    if (slot < 0) | (slot >= S):
        return
    i = tl.arange(0, BLOCK_T)
    in_t = i < tl.load(table + _TILE_COUNT * T + tile)
    token = tl.load(table + _ORDER * T + tl.load(table + _TILE_START * T + tile) + i, mask=in_t, other=0)
    r, k = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_K)
    x_tile = x + token.to(tl.int64)[:, None] * stride_x + k[None, :]
    a_tile = a + slot * stride_as + r.to(tl.int64)[None, :] * stride_ar + k[:, None]
    per_split = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLIT_K) * BLOCK_K
    first = split * per_split
    acc = tl.zeros((BLOCK_T, BLOCK_R), dtype=tl.float32)
    for start in range(first, tl.minimum(first + per_split, K), BLOCK_K):
        left = tl.load(x_tile + start, mask=in_t[:, None] & (k[None, :] < K - start), other=0.0)
        right = tl.load(a_tile + start, mask=(r[None, :] < R) & (k[:, None] < K - start), other=0.0)
        acc = dot(left, right, acc)
    place = sums + (split.to(tl.int64) * T + token.to(tl.int64))[:, None] * R + r[None, :]
    tl.store(place, acc, mask=in_t[:, None] & (r[None, :] < R))


@triton.jit(do_not_specialize=["T"])
def expand_tiles_kernel(
    y,
    b,
    scales,
    sums,
    table,
    T,
    S,
    R,
    M,
    stride_y,
    stride_bs,
    stride_bm,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SPLIT_K: tl.constexpr,
):
    """y[t, m] += scales[slot] * sum_r (sum over splits of sums[split, t, r]) b[slot, m, r], for one tile's tokens."""
    tile = tl.program_id(0)
    slot = tl.load(table + _TILE_SLOT * T + tile).to(tl.int64)
    if (slot < 0) | (slot >= S):
        return
    i = tl.arange(0, BLOCK_T)
    in_t = i < tl.load(table + _TILE_COUNT * T + tile)
    token = tl.load(table + _ORDER * T + tl.load(table + _TILE_START * T + tile) + i, mask=in_t, other=0).to(tl.int64)
    r, m = tl.arange(0, BLOCK_R), tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    low = tl.zeros((BLOCK_T, BLOCK_R), dtype=tl.float32)
    in_low = in_t[:, None] & (r[None, :] < R)
    for split in tl.static_range(SPLIT_K):
        place = sums + (tl.full((), split, tl.int64) * T + token)[:, None] * R + r[None, :]
        low += tl.load(place, mask=in_low, other=0.0)
    in_b = (r[:, None] < R) & (m[None, :] < M)
    right = tl.load(b + slot * stride_bs + m.to(tl.int64)[None, :] * stride_bm + r[:, None], mask=in_b, other=0.0)
    change = tl.zeros((BLOCK_T, BLOCK_M), dtype=tl.float32)
    if b.dtype.element_ty == tl.bfloat16:
        high = low.to(tl.bfloat16)
        rest = tl.where(tl.abs(low) < float("inf"), low - high.to(tl.float32), 0.0)
        change = dot(rest.to(tl.bfloat16), right, change)
        change = dot(high, right, change)
    else:
        change = dot(low, right.to(tl.float32), change)
    inside = in_t[:, None] & (m[None, :] < M)
    place = y + token[:, None] * stride_y + m[None, :]
    before = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    after = before + change * tl.load(scales + slot).to(tl.float32)
    tl.store(place, after.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["T"])
def shrink_tokens_kernel(
    x,
    a,
    sums,
    table,
    T,
    S,
    R,
    K,
    stride_x,
    stride_as,
    stride_ar,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
):
    """`shrink_tiles_kernel` for one token, without the tensor cores."""
    t, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(table + _SLOT * T + t).to(tl.int64)
    if (slot < 0) | (slot >= S):
        return
    r, k = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_K)
    a_tile = a + slot * stride_as + r.to(tl.int64)[:, None] * stride_ar + k[None, :]
    per_split = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLIT_K) * BLOCK_K
    first = split * per_split
    acc = tl.zeros((BLOCK_R,), dtype=tl.float32)
    for start in range(first, tl.minimum(first + per_split, K), BLOCK_K):
        row = tl.load(x + t * stride_x + start + k, mask=k < K - start, other=0.0).to(tl.float32)
        part = tl.load(a_tile + start, mask=(r[:, None] < R) & (k[None, :] < K - start), other=0.0).to(tl.float32)
        acc += tl.sum(part * row[None, :], axis=1)
    tl.store(sums + (split.to(tl.int64) * T + t) * R + r, acc, mask=r < R)


@triton.jit(do_not_specialize=["T"])
def expand_tokens_kernel(
    y,
    b,
    scales,
    sums,
    table,
    T,
    S,
    R,
    M,
    stride_y,
    stride_bs,
    stride_bm,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SPLIT_K: tl.constexpr,
):
    """`expand_tiles_kernel` for one token, without the tensor cores."""
    t = tl.program_id(0).to(tl.int64)
    slot = tl.load(table + _SLOT * T + t).to(tl.int64)
    if (slot < 0) | (slot >= S):
        return
    r, m = tl.arange(0, BLOCK_R), tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    low = tl.zeros((BLOCK_R,), dtype=tl.float32)
    for split in tl.static_range(SPLIT_K):
        low += tl.load(sums + (tl.full((), split, tl.int64) * T + t) * R + r, mask=r < R, other=0.0)
    in_b = (m[:, None] < M) & (r[None, :] < R)
    part = tl.load(b + slot * stride_bs + m.to(tl.int64)[:, None] * stride_bm + r[None, :], mask=in_b, other=0.0)
    change = tl.sum(part.to(tl.float32) * low[None, :], axis=1) * tl.load(scales + slot).to(tl.float32)
    place = y + t * stride_y + m
    before = tl.load(place, mask=m < M, other=0.0).to(tl.float32)
    tl.store(place, (before + change).to(y.dtype.element_ty), mask=m < M)


def default_config(rank: int, inputs: int) -> dict[str, int]:
    """Tile sizes by rank and K alone: a token's result may not depend on how many others there are."""
    split = 1
    while split < 8 and inputs >= split * 1024:
        split *= 2
    sizes = {
        "BLOCK_K": 128 if rank <= 32 else 64,
        "BLOCK_M": 128 if rank <= 32 else 64 if rank <= 64 else 32,
        "SPLIT_K": split,
    }
    return {**sizes, "num_warps": 4 if rank <= 64 else 8, "num_stages": 3}


def _cases() -> tuple[AotCase, ...]:
    numbers = dict.fromkeys(("T", "S", "R"), "i32")
    shrinks = {"x": "*bf16", "a": "*bf16", "sums": "*fp32", "table": "*i32", **numbers}
    shrinks |= dict.fromkeys(("K", "stride_x", "stride_as", "stride_ar"), "i32")
    expands = {"y": "*bf16", "b": "*bf16", "scales": "*fp32", "sums": "*fp32", "table": "*i32", **numbers}
    expands |= dict.fromkeys(("M", "stride_y", "stride_bs", "stride_bm"), "i32")
    cases = []
    for rank in (16, 32, 64):
        config = default_config(rank, 4096)
        for kind, tile in (("tiles16", {"BLOCK_T": 16}), ("tiles64", {"BLOCK_T": 64}), ("tokens", {})):
            shrink, expand = (
                (shrink_tiles_kernel, expand_tiles_kernel) if tile else (shrink_tokens_kernel, expand_tokens_kernel)
            )
            sizes = {**tile, "BLOCK_R": rank, "SPLIT_K": config["SPLIT_K"]}
            options = (config["num_warps"], config["num_stages"])
            steps = (("shrink", shrink, shrinks, "BLOCK_K"), ("expand", expand, expands, "BLOCK_M"))
            for name, kernel, signature, own in steps:
                aligned = tuple(argument for argument in signature if argument not in ("T", "S"))
                constants = {**sizes, own: config[own]}
                cases.append(AotCase(f"{name}-{kind}-r{rank}", kernel, signature, constants, *options, aligned))
    return tuple(cases)


AOT_CASES = _cases()
