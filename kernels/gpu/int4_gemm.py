"""Products with a weight of 4-bit codes on the GPU: the weight travels as codes and becomes numbers in registers.

Launched by `quantized_linear`. After Frantar et al. 2025 (MARLIN, sections 3.2 to 3.4): codes are turned into numbers
by writing them into the mantissa of a constant, and the scale of a group of 128 inputs is applied after the group's
product, to sums instead of weights. Words are laid out so that a tile is one run of memory and unpacks in place
(`packing.QuantizedWeight`). A split of K keeps all processors reading; a second kernel adds the parts in order.
Legend: T tokens, K inputs, M outputs, G groups of 128 inputs.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from penstock.kernels.gpu.aot import AotCase
from penstock.kernels.gpu.gemm import Operands, add_splits
from penstock.kernels.gpu.matrix_tiles import dot, tile_of

Config = Mapping[str, int]

_TARGET_PROGRAMS = 528  # four to a processor: a tile's words are few, and reads must overlap


@triton.jit
def numbers_of(codes, element: tl.constexpr):
    """Codes 0 .. 15 to -8 .. 7, exactly: the last mantissa bits of 128 + code, or of 1024 + code, are the code."""
    if element == tl.bfloat16:
        return ((codes | 0x4300).to(tl.int16).to(tl.bfloat16, bitcast=True).to(tl.float32) - 136.0).to(tl.bfloat16)
    elif element == tl.float16:
        return (codes | 0x6400).to(tl.int16).to(tl.float16, bitcast=True) - 1032.0
    else:
        return (codes - 8).to(tl.float32)


@triton.jit(do_not_specialize=["T"])
def int4_gemm_kernel(
    x,
    words,
    scales,
    bias,
    out,
    T,
    M,
    G,
    stride_x,
    stride_out,
    BLOCK_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
    GROUP_T: tl.constexpr,
    SPLIT_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """out[t, m] = sum_g scales[g, m] sum_k x[t, 128 g + k] code[m, 128 g + k], plus bias; sums only where split."""
    split = tl.program_id(1)
    pid_m, pid_t = tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(T, BLOCK_T), GROUP_T)
    m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    t = pid_t * BLOCK_T + tl.arange(0, BLOCK_T)
    k = tl.arange(0, 16)
    in_m, in_t = m < M, t < T
    words_tile = words + m.to(tl.int64)[:, None] * 16 + tl.arange(0, 16)[None, :]
    x_tile = x + t.to(tl.int64)[None, :] * stride_x + k[:, None]

    per_split = tl.cdiv(G, SPLIT_K)
    first = split * per_split
    last = tl.minimum(first + per_split, G)
    acc = tl.zeros((BLOCK_M, BLOCK_T), dtype=tl.float32)
    for g in range(first, last):
        start = tl.cast(g, tl.int64) * M
        packed = tl.load(words_tile + start * 16, mask=in_m[:, None], other=0)
        scale = tl.load(scales + start + m, mask=in_m, other=0.0).to(tl.float32)
        part = tl.zeros((BLOCK_M, BLOCK_T), dtype=tl.float32)
        for nibble in tl.static_range(8):
            right = tl.load(x_tile + g * 128 + nibble * 16, mask=in_t[None, :], other=0.0)
            left = numbers_of((packed >> (4 * nibble)) & 15, x.dtype.element_ty)
            part = dot(left, right, part)
        acc += part * scale[:, None]

    inside = in_m[:, None] & in_t[None, :]
    if SPLIT_K == 1:
        if HAS_BIAS:
            acc += tl.load(bias + m, mask=in_m, other=0.0).to(tl.float32)[:, None]
        place = out + t.to(tl.int64)[None, :] * stride_out + m[:, None]
        tl.store(place, acc.to(out.dtype.element_ty), mask=inside)
    else:
        place = out + (split.to(tl.int64) * T + t.to(tl.int64))[None, :] * M + m[:, None]
        tl.store(place, acc, mask=inside)


def multiply_int4(
    x_TK: Tensor, words: Tensor, scales: Tensor, out: Tensor, bias: Tensor | None, config: Config
) -> None:
    """Fill `out` [T, M]; T at least 1, rows of x dense."""
    tokens = len(x_TK)
    groups, outputs, _ = words.shape
    split = config["SPLIT_K"]
    target = out if split == 1 else torch.empty(split, tokens, outputs, device=x_TK.device, dtype=torch.float32)
    tiles = triton.cdiv(outputs, config["BLOCK_M"]) * triton.cdiv(tokens, config["BLOCK_T"])
    int4_gemm_kernel[(tiles, split)](
        x_TK,
        words,
        scales,
        out if bias is None else bias,
        target,
        tokens,
        outputs,
        groups,
        x_TK.stride(0),
        out.stride(0),
        BLOCK_T=config["BLOCK_T"],
        BLOCK_M=config["BLOCK_M"],
        GROUP_T=config["GROUP_T"],
        SPLIT_K=split,
        HAS_BIAS=bias is not None,
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
    )
    if split > 1:
        add_splits(target, Operands(x_TK, words, out, bias))


def default_config(tokens: int, outputs: int, groups: int) -> dict[str, int]:
    """Tile sizes for a shape that nobody tuned."""
    block_t = next((size for size in (16, 32, 64) if tokens <= size), 128)
    block_m = 64 if block_t < 128 else 128
    sizes = {"BLOCK_T": block_t, "BLOCK_M": block_m, "GROUP_T": 8, "num_warps": 4 if block_t < 128 else 8}
    return {**sizes, "num_stages": 4 if block_t < 128 else 3, "SPLIT_K": _splits(tokens, outputs, groups, block_m)}


def _splits(tokens: int, outputs: int, groups: int, block_m: int) -> int:
    if tokens > 64:
        return 1
    tiles, splits = -(-outputs // block_m), 1
    while splits < 16 and tiles * splits * 2 <= _TARGET_PROGRAMS and groups >= splits * 4:
        splits *= 2
    return splits


def _cases() -> tuple[AotCase, ...]:
    numbers = dict.fromkeys(("T", "M", "G", "stride_x", "stride_out"), "i32")
    aligned = ("x", "words", "scales", "bias", "out", "M", "G", "stride_x", "stride_out")
    cases = []
    for element, scale, counts in (
        ("bf16", "bf16", (16, 32, 64, 128)),
        ("fp16", "bf16", (16,)),
        ("fp32", "fp32", (16,)),
    ):
        for tokens in counts:
            for split in (1, 4) if tokens <= 64 else (1,):
                config = default_config(tokens, 4096, 32) | {"SPLIT_K": split}
                tiles = {key: value for key, value in config.items() if not key.startswith("num_")}
                out = f"*{element}" if split == 1 else "*fp32"
                pointers = {
                    "x": f"*{element}",
                    "words": "*i32",
                    "scales": f"*{scale}",
                    "bias": f"*{element}",
                    "out": out,
                }
                cases.append(
                    AotCase(
                        f"{element}-t{tokens}-split{split}",
                        int4_gemm_kernel,
                        {**pointers, **numbers},
                        {**tiles, "HAS_BIAS": split == 1},
                        config["num_warps"],
                        config["num_stages"],
                        aligned,
                    )
                )
    return tuple(cases)


AOT_CASES = _cases()
