"""One matrix product for all weights that are stored as a plain [M, K] matrix of floats, e4m3 or int8 codes.

Launched by `linear` and `quantized_linear`. The weight is the left operand and tokens are the right one, so that a
step of one to sixteen tokens still fills the 64 rows of a Hopper matrix instruction. With few tokens there are fewer
output tiles than processors: K is then split, each split writes float32 sums of its own, and a second kernel adds them
in order (Osama et al. 2023, Stream-K, section 2, with fixed splits and no fix-up), so results never depend on timing.
Legend: T tokens, K inputs, M outputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

import torch
import triton
import triton.language as tl
from torch import Tensor

from penstock.kernels.gpu.aot import AotCase
from penstock.kernels.gpu.matrix_tiles import (
    BLOCK_SCALES,
    CHANNEL_SCALES,
    NO_SCALES,
    ONE_SCALE,
    decode_e4m3,
    dot,
    tile_of,
    tile_scales,
)

# Enough programs for two waves over the processors of the largest card that we know.
_TARGET_PROGRAMS = 264


@triton.jit(do_not_specialize=["T"])
def gemm_kernel(
    x,
    w,
    bias,
    x_scales,
    w_scales,
    out,
    T,
    M,
    K,
    stride_x,
    stride_w,
    stride_out,
    BLOCK_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_T: tl.constexpr,
    SPLIT_K: tl.constexpr,
    SCALES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """out[t, m] = sum_k x[t, k] w[m, k], times scales, plus bias; sums only, at [split, t, m], where K is split."""
    split = tl.program_id(1)
    pid_m, pid_t = tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(T, BLOCK_T), GROUP_T)
    m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    t = pid_t * BLOCK_T + tl.arange(0, BLOCK_T)
    k = tl.arange(0, BLOCK_K)
    w_tile = w + m.to(tl.int64)[:, None] * stride_w + k[None, :]
    x_tile = x + t.to(tl.int64)[None, :] * stride_x + k[:, None]
    in_m, in_t = m < M, t < T

    chunks = tl.cdiv(K, BLOCK_K)
    per_split = tl.cdiv(chunks, SPLIT_K)
    first = split * per_split
    last = tl.minimum(first + per_split, chunks)
    blocks = tl.cdiv(K, 128)
    ACC: tl.constexpr = tl.int32 if w.dtype.element_ty == tl.int8 else tl.float32
    ZERO: tl.constexpr = 0 if w.dtype.element_ty.is_int() else 0.0
    acc = tl.zeros((BLOCK_M, BLOCK_T), dtype=ACC)
    for chunk in range(first, last):
        start = chunk * BLOCK_K
        if EVEN_K:
            left = tl.load(w_tile + start, mask=in_m[:, None], other=ZERO)
            right = tl.load(x_tile + start, mask=in_t[None, :], other=ZERO)
        else:
            left = tl.load(w_tile + start, mask=in_m[:, None] & (k[None, :] < K - start), other=ZERO)
            right = tl.load(x_tile + start, mask=in_t[None, :] & (k[:, None] < K - start), other=ZERO)
        if w.dtype.element_ty == tl.uint8:
            left = decode_e4m3(left, tl.bfloat16)
            right = decode_e4m3(right, tl.bfloat16)
        if SCALES == BLOCK_SCALES:
            per_token = tl.load(x_scales + t.to(tl.int64) * blocks + start // 128, mask=in_t, other=0.0)
            of_block = tl.load(w_scales + (pid_m * BLOCK_M // 128) * blocks + start // 128)
            part = dot(left, right, tl.zeros((BLOCK_M, BLOCK_T), dtype=tl.float32))
            acc += part * (per_token * of_block)[None, :]
        else:
            acc = dot(left, right, acc)

    inside = in_m[:, None] & in_t[None, :]
    if SPLIT_K == 1:
        total = acc.to(tl.float32) * tile_scales(x_scales, w_scales, m, t, M, T, SCALES)
        if HAS_BIAS:
            total += tl.load(bias + m, mask=in_m, other=0.0).to(tl.float32)[:, None]
        place = out + t.to(tl.int64)[None, :] * stride_out + m[:, None]
        tl.store(place, total.to(out.dtype.element_ty), mask=inside)
    else:
        place = out + (split.to(tl.int64) * T + t.to(tl.int64))[None, :] * M + m[:, None]
        tl.store(place, acc, mask=inside)


@triton.jit(do_not_specialize=["T"])
def reduce_splits_kernel(
    partials,
    bias,
    x_scales,
    w_scales,
    out,
    T,
    M,
    stride_out,
    BLOCK_M: tl.constexpr,
    SPLIT_K: tl.constexpr,
    SCALES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """out[t, m] = (sum over splits, first to last, of partials[split, t, m]) times scales, plus bias."""
    t = tl.program_id(0).to(tl.int64)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = m < M
    acc = tl.load(partials + t * M + m, mask=inside, other=0)
    for split in tl.static_range(1, SPLIT_K):
        acc += tl.load(partials + (split * T + t) * M + m, mask=inside, other=0)
    total = acc.to(tl.float32)
    if SCALES == ONE_SCALE:
        total *= tl.load(w_scales) * tl.load(x_scales + t)
    elif SCALES == CHANNEL_SCALES:
        total *= tl.load(w_scales + m, mask=inside, other=0.0) * tl.load(x_scales + t)
    if HAS_BIAS:
        total += tl.load(bias + m, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + t * stride_out + m, total.to(out.dtype.element_ty), mask=inside)


@dataclass(frozen=True, slots=True)
class Operands:
    """The tensors of one product; `scaling` is one of the constants of `matrix_tiles`."""

    x: Tensor  # [T, K], rows dense
    weight: Tensor  # [M, K], rows dense
    out: Tensor  # [T, M]
    bias: Tensor | None = None
    x_scales: Tensor | None = None
    w_scales: Tensor | None = None
    scaling: int = 0


def multiply(operands: Operands, config: Mapping[str, int]) -> None:
    """Fill `operands.out`. T, K and M are at least 1; `config` holds the tile sizes, the split and Triton's options."""
    tokens, inputs = operands.x.shape
    outputs = operands.weight.shape[0]
    split, block_k = config["SPLIT_K"], config["BLOCK_K"]
    out, x = operands.out, operands.x
    integers = operands.weight.dtype is torch.int8
    sums = torch.empty(split, tokens, outputs, device=x.device, dtype=torch.int32 if integers else torch.float32)
    # A pointer that a kernel ignores still has to be one.
    bias, x_scales, w_scales = (out if one is None else one for one in _optional(operands))
    tiles = triton.cdiv(outputs, config["BLOCK_M"]) * triton.cdiv(tokens, config["BLOCK_T"])
    gemm_kernel[(tiles, split)](
        x,
        operands.weight,
        bias,
        x_scales,
        w_scales,
        out if split == 1 else sums,
        tokens,
        outputs,
        inputs,
        x.stride(0),
        operands.weight.stride(0),
        out.stride(0),
        BLOCK_T=config["BLOCK_T"],
        BLOCK_M=config["BLOCK_M"],
        BLOCK_K=block_k,
        GROUP_T=config["GROUP_T"],
        SPLIT_K=split,
        SCALES=operands.scaling,
        HAS_BIAS=operands.bias is not None,
        EVEN_K=inputs % block_k == 0,
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
    )
    if split > 1:
        add_splits(sums, operands)


def add_splits(sums: Tensor, operands: Operands) -> None:
    """Fill `operands.out` from partial sums [splits, T, M]; blocks' scales are in them already."""
    splits, tokens, outputs = sums.shape
    out = operands.out
    bias, x_scales, w_scales = (out if one is None else one for one in _optional(operands))
    scaling = NO_SCALES.value if operands.scaling == BLOCK_SCALES.value else operands.scaling
    reduce_splits_kernel[(tokens, triton.cdiv(outputs, _REDUCE_BLOCK))](
        sums,
        bias,
        x_scales,
        w_scales,
        out,
        tokens,
        outputs,
        out.stride(0),
        BLOCK_M=_REDUCE_BLOCK,
        SPLIT_K=splits,
        SCALES=scaling,
        HAS_BIAS=operands.bias is not None,
        num_warps=4,
    )


_REDUCE_BLOCK = 512


def _optional(operands: Operands) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    return operands.bias, operands.x_scales, operands.w_scales


class Kind(Enum):
    """What the operands are, as far as tile sizes go."""

    FLOATS = "float32"
    HALVES = "two bytes"
    CODES = "one byte, known to the card"
    BLOCKS = "one byte, known to the card, scaled by block"
    DECODED = "one byte, decoded on the way"


def default_config(tokens: int, outputs: int, inputs: int, kind: Kind) -> dict[str, int]:
    """Tile sizes for a shape that nobody tuned; the number of tokens counts by its bucket only."""
    few = next((size for size in (16, 32, 64) if tokens <= size), 0)
    if kind is Kind.FLOATS:
        return {**_tiles(16 if few == 16 else 32, 64, 32, 4, 2), "SPLIT_K": _splits(few, outputs, inputs, 32)}
    if kind is Kind.DECODED:
        return {**_tiles(few or 64, 64, 64, 4 if few else 8, 3), "SPLIT_K": _splits(few, outputs, inputs, 64)}
    if few:
        return {
            **_tiles(few, 64, 128, 4 if few < 64 else 8, 4 if few < 64 else 3),
            "SPLIT_K": _splits(few, outputs, inputs, 128),
        }
    chunk = 64 if kind is Kind.HALVES else 128
    # A tile of 128 tokens and its part of one block do not both fit the registers.
    wide = tokens > 512 and kind is not Kind.BLOCKS
    return {**_tiles(128 if wide else 64, 128, chunk, 8 if wide else 4, 4), "SPLIT_K": 1}


def _tiles(block_t: int, block_m: int, block_k: int, warps: int, stages: int) -> dict[str, int]:
    sizes = {"BLOCK_T": block_t, "BLOCK_M": block_m, "BLOCK_K": block_k, "GROUP_T": 8}
    return {**sizes, "num_warps": warps, "num_stages": stages}


def _splits(few: int, outputs: int, inputs: int, block_k: int) -> int:
    """A power of two that fills the card, with at least four chunks of K to each; 1 where tokens are many."""
    if not few:
        return 1
    tiles, chunks, splits = -(-outputs // 64), -(-inputs // block_k), 1
    while splits < 8 and tiles * splits * 2 <= _TARGET_PROGRAMS and chunks >= splits * 8:
        splits *= 2
    return splits


# Cards that know e4m3 take codes as they are; the others decode them.
_TARGETS = {"fp8e4nv": ("sm_90",), "u8": ("sm_80", "gfx942")}


def aot_cases(name: str, element: str, scaling: int, kind: Kind) -> tuple[AotCase, ...]:
    """The configurations that `default_config` can give, for operands of Triton type `element`."""
    cases = []
    for tokens in (16, 32, 64, 512, 8192):
        for split in (1, 4) if tokens <= 64 else (1,):
            config = default_config(tokens, 16384, 256, kind) | {"SPLIT_K": split}
            cases.append(_case(f"{name}-t{tokens}-split{split}", element, scaling, config, even=True))
    ragged = default_config(512, 16384, 256, kind)
    cases.append(_case(f"{name}-t512-ragged", element, scaling, ragged, even=False))
    return tuple({tuple(sorted(case.constexprs.items())): case for case in cases}.values())


def _case(name: str, element: str, scaling: int, config: Mapping[str, int], even: bool) -> AotCase:
    split = config["SPLIT_K"]
    total, sums = "*fp32" if element == "fp32" else "*bf16", "*i32" if element == "i8" else "*fp32"
    pointers = {"x": f"*{element}", "w": f"*{element}", "bias": total, "x_scales": "*fp32", "w_scales": "*fp32"}
    numbers = dict.fromkeys(("T", "M", "K", "stride_x", "stride_w", "stride_out"), "i32")
    signature = {**pointers, "out": total if split == 1 else sums, **numbers}
    tiles = {key: value for key, value in config.items() if not key.startswith("num_")}
    return AotCase(
        name,
        gemm_kernel,
        signature,
        {**tiles, "SCALES": scaling, "HAS_BIAS": split == 1, "EVEN_K": even},
        config["num_warps"],
        config["num_stages"],
        tuple(argument for argument in signature if argument != "T"),
        targets=_TARGETS.get(element, ()),
    )


def reduce_cases(name: str, sums: str, out: str, scaling: int) -> tuple[AotCase, ...]:
    """The reduction after a split product."""
    pointers = {"partials": f"*{sums}", "bias": out, "x_scales": "*fp32", "w_scales": "*fp32", "out": out}
    constants = {"BLOCK_M": _REDUCE_BLOCK, "SPLIT_K": 4, "SCALES": scaling, "HAS_BIAS": True}
    signature = {**pointers, "T": "i32", "M": "i32", "stride_out": "i32"}
    return (
        AotCase(f"{name}-reduce", reduce_splits_kernel, signature, constants, 4, 3, (*pointers, "M", "stride_out")),
    )
