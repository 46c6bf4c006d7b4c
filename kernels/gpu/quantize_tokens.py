"""Activations to codes and scales on the GPU, one program per token; the codes equal those of `kernels/quantize.py`.

Launched by `quantized_linear`. e4m3 is encoded in integer arithmetic, so that every GPU gives the same bits.
Legend: T tokens, K inputs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from penstock.kernels.gpu.aot import AotCase
from penstock.kernels.gpu.matrix_tiles import encode_e4m3
from penstock.kernels.packing import GROUP, QuantFormat, QuantizedWeight

_MOST_AT_ONCE = 4096  # inputs that a program holds


@triton.jit
def scale_of(largest, unusable, CODE: tl.constexpr):
    """Largest magnitude / largest code, at least 2^-126; NaN where `unusable`."""
    scale = tl.div_rn(largest, CODE)
    scale = tl.where(scale < 1.1754943508222875e-38, 1.1754943508222875e-38, scale)
    return tl.where(unusable > 0, float("nan"), scale)


@triton.jit
def codes_of(value, scale, INTEGERS: tl.constexpr):
    """Value / scale to nearest even, saturated: int8, or e4m3 as uint8."""
    quotient = tl.div_rn(value, scale)
    if INTEGERS:
        quotient = tl.where(quotient == quotient, quotient, 0.0)
        quotient = tl.minimum(tl.maximum(quotient, -127.0), 127.0)
        # Adding 1.5 * 2^23 leaves no room for a fraction: the hardware rounds it, ties to even.
        return ((quotient + 12582912.0) - 12582912.0).to(tl.int8)
    else:
        return encode_e4m3(quotient)


@triton.jit
def quantize_tokens_kernel(
    x, fixed, codes, scales, K, stride_x, BLOCK: tl.constexpr, INTEGERS: tl.constexpr, HAS_FIXED: tl.constexpr
):
    """One scale per token: codes[t, k] of x[t, k], scales[t]."""
    t = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    CODE: tl.constexpr = 127.0 if INTEGERS else 448.0
    largest = tl.zeros((BLOCK,), dtype=tl.float32)
    strange = tl.zeros((BLOCK,), dtype=tl.int32)
    for start in range(0, K, BLOCK):
        value = tl.load(x + t * stride_x + start + k, mask=start + k < K, other=0.0).to(tl.float32)
        # With a scale of its own a token cannot hold infinities; with a fixed one they saturate.
        fine = (value == value) if HAS_FIXED else (tl.abs(value) < float("inf"))
        strange = tl.where(fine, strange, 1)
        largest = tl.maximum(largest, tl.where(fine, tl.abs(value), 0.0))
    scale = scale_of(tl.max(largest, axis=0), tl.max(strange, axis=0), CODE)
    if HAS_FIXED:
        scale = tl.where(tl.max(strange, axis=0) > 0, float("nan"), tl.load(fixed))
    tl.store(scales + t, scale)
    for start in range(0, K, BLOCK):
        value = tl.load(x + t * stride_x + start + k, mask=start + k < K, other=0.0).to(tl.float32)
        tl.store(codes + t * K + start + k, codes_of(value, scale, INTEGERS), mask=start + k < K)


@triton.jit
def quantize_groups_kernel(x, codes, scales, K, stride_x, GROUPS: tl.constexpr):
    """One scale per token and 128 inputs: codes[t, k] as e4m3, scales[t, k // 128]; GROUPS of them per program."""
    t = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    k = group[:, None] * 128 + tl.arange(0, 128)[None, :]
    value = tl.load(x + t * stride_x + k, mask=k < K, other=0.0).to(tl.float32)
    fine = tl.abs(value) < float("inf")
    largest = tl.max(tl.where(fine, tl.abs(value), 0.0), axis=1)
    scale = scale_of(largest, tl.max(tl.where(fine, 0, 1), axis=1), 448.0)
    groups = tl.cdiv(K, 128)
    tl.store(scales + t * groups + group, scale, mask=group < groups)
    tl.store(codes + t * K + k, codes_of(value, scale[:, None], False), mask=k < K)


def quantize_tokens(x_TK: Tensor, weight: QuantizedWeight) -> tuple[Tensor, Tensor]:
    """See `kernels.quantize.quantize_tokens`; rows of x dense."""
    tokens, inputs = x_TK.shape
    integers = weight.format is QuantFormat.INT8_CHANNEL
    codes = torch.empty(tokens, inputs, device=x_TK.device, dtype=torch.int8 if integers else torch.uint8)
    told = codes if integers else codes.view(torch.float8_e4m3fn)
    if weight.format is QuantFormat.FP8_BLOCK:
        groups = -(-inputs // GROUP)
        scales = torch.empty(tokens, groups, device=x_TK.device)
        if tokens:
            grid = (tokens, triton.cdiv(groups, _GROUPS))
            quantize_groups_kernel[grid](x_TK, codes, scales, inputs, x_TK.stride(0), GROUPS=_GROUPS, num_warps=4)
        return told, scales
    scales = torch.empty(tokens, device=x_TK.device)
    fixed = weight.input_scale
    if tokens:
        block = min(triton.next_power_of_2(inputs), _MOST_AT_ONCE)
        quantize_tokens_kernel[(tokens,)](
            x_TK,
            scales if fixed is None else fixed,
            codes,
            scales,
            inputs,
            x_TK.stride(0),
            BLOCK=block,
            INTEGERS=integers,
            HAS_FIXED=fixed is not None,
            num_warps=8,
        )
    return told, scales


_GROUPS = 16


def _cases() -> tuple[AotCase, ...]:
    pointers = {"x": "*bf16", "fixed": "*fp32", "scales": "*fp32"}
    numbers = {"K": "i32", "stride_x": "i32"}
    aligned = ("x", "fixed", "codes", "scales", "K", "stride_x")
    cases = [
        AotCase(
            f"tokens-{'int8' if integers else 'fp8'}{'-fixed' if fixed else ''}",
            quantize_tokens_kernel,
            {**pointers, "codes": "*i8" if integers else "*u8", **numbers},
            {"BLOCK": _MOST_AT_ONCE, "INTEGERS": integers, "HAS_FIXED": fixed},
            8,
            3,
            aligned,
        )
        for integers, fixed in ((False, False), (False, True), (True, False))
    ]
    del pointers["fixed"]
    grouped = {**pointers, "codes": "*u8", **numbers}
    own = tuple(name for name in aligned if name != "fixed")
    cases.append(AotCase("groups", quantize_groups_kernel, grouped, {"GROUPS": _GROUPS}, 4, 3, own))
    return tuple(cases)


AOT_CASES = _cases()
