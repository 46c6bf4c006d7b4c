"""The quantised formats: how scales and codes are made and read back, in torch, on any device, bit for bit the same.

Called by the `quantized_linear` modules of every backend; the GPU's own quantiser of activations must give the codes
that `quantize_tokens` gives. All arithmetic is float32: scale = largest magnitude / largest code, rounded to nearest;
code = value / scale, rounded to nearest even and saturated. Layouts are those of `packing.QuantizedWeight`.
A token that holds a NaN (or an infinity, unless its scale is fixed) gets a NaN for scale, hence a row of NaN.
Methods: round to nearest with symmetric scales; e4m3 as in Micikevicius et al. 2022 (FP8 formats); blocks of 1 x 128
and 128 x 128 as in DeepSeek-V3 (2024, section 3.3.2); groups as in Frantar et al. 2025 (MARLIN, section 3).
Legend: T tokens, K inputs, M outputs, G groups of 128 inputs.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from penstock.kernels import expect
from penstock.kernels.errors import KernelInputError
from penstock.kernels.packing import BLOCK, GROUP, QuantFormat, QuantizedWeight

E4M3_MAX = 448.0
INT8_MAX = 127.0
# A scale is never below the smallest normal float32: that makes an all-zero row safe and keeps quotients finite.
SMALLEST_SCALE = 2.0**-126
# 127 * 127 * inputs must fit an int32 sum.
MOST_INT8_INPUTS = 131_072
WORDS = GROUP // 8  # int32 words of one group


def quantize_weight(
    weight_MK: Tensor, format: QuantFormat, bias: Tensor | None, input_scale: float | None
) -> QuantizedWeight:
    """See `ops.quantize_weight`."""
    form = _check_weight(weight_MK, format, bias, input_scale)
    outputs, inputs = weight_MK.shape
    weight = weight_MK.float()
    if not bool(torch.isfinite(weight).all()):
        raise KernelInputError("quantize_weight", "weight", "holds a NaN or an infinity")
    if form is QuantFormat.INT4_GROUP:
        codes, scales = _int4(weight, torch.float32 if weight_MK.dtype.itemsize > 2 else torch.bfloat16)
    elif form is QuantFormat.FP8_TENSOR:
        scales = _scale(weight.abs().amax().view(1), E4M3_MAX)
        codes = fp8_codes(weight, scales)
    elif form is QuantFormat.FP8_BLOCK:
        scales = _scale(_block_amax(weight), E4M3_MAX)
        codes = fp8_codes(weight, spread_blocks(scales, outputs, inputs))
    elif form is QuantFormat.FP8_CHANNEL:
        scales = _scale(weight.abs().amax(dim=1), E4M3_MAX)
        codes = fp8_codes(weight, scales[:, None])
    else:
        scales = _scale(weight.abs().amax(dim=1), INT8_MAX)
        codes = int8_codes(weight, scales[:, None])
    fixed = None if input_scale is None else torch.full((1,), input_scale, device=weight.device)
    return QuantizedWeight(form, codes, scales, bias, outputs, inputs, fixed)


def _check_weight(weight: Tensor, format: QuantFormat, bias: Tensor | None, input_scale: float | None) -> QuantFormat:
    op = "quantize_weight"
    expect.weight(op, weight, bias)
    expect.at_least(op, "weight outputs", weight.shape[0], 1)
    expect.at_least(op, "weight inputs", weight.shape[1], 1)
    if format not in tuple(QuantFormat):
        raise KernelInputError(op, "format", f"{format!r}; expected one of {', '.join(QuantFormat)}")
    form = QuantFormat(format)
    if form is QuantFormat.INT4_GROUP and weight.shape[1] % GROUP:
        raise KernelInputError(op, "weight", f"{weight.shape[1]} inputs; int4_group needs a multiple of {GROUP}")
    if form is QuantFormat.INT8_CHANNEL and weight.shape[1] > MOST_INT8_INPUTS:
        raise KernelInputError(op, "weight", f"{weight.shape[1]} inputs; an int32 sum holds {MOST_INT8_INPUTS}")
    if input_scale is not None:
        if form not in (QuantFormat.FP8_TENSOR, QuantFormat.FP8_CHANNEL):
            raise KernelInputError(op, "input_scale", f"{form} scales each token by itself")
        if not (math.isfinite(input_scale) and input_scale >= SMALLEST_SCALE):
            raise KernelInputError(op, "input_scale", f"{input_scale}; expected a positive number")
    return form


def check_input(x_TK: Tensor, weight: QuantizedWeight) -> None:
    """Demand an input that this weight can be multiplied with."""
    op = "quantized_linear"
    expect.dtype(op, "x", x_TK, *expect.FLOATS)
    expect.shape(op, "x", x_TK, None, weight.num_inputs)
    expect.device(op, "x", x_TK, weight.codes)


def quantize_tokens(x_TK: Tensor, weight: QuantizedWeight) -> tuple[Tensor, Tensor]:
    """The activations' codes [T, K] and scales, float32 [T], or [T, ceil(K / 128)] for fp8_block."""
    x = x_TK.float()
    if weight.format is QuantFormat.FP8_BLOCK:
        tokens, inputs = x.shape
        padded = F.pad(x, (0, -inputs % GROUP)).view(tokens, -(-inputs // GROUP), GROUP)
        scales = _scale(padded.abs().amax(dim=2), E4M3_MAX)
        return fp8_codes(x, scales.repeat_interleave(GROUP, dim=1)[:, :inputs]), _told(scales)
    largest = INT8_MAX if weight.format is QuantFormat.INT8_CHANNEL else E4M3_MAX
    scales = _scale(x.abs().amax(dim=1), largest)
    if weight.input_scale is not None:
        scales = torch.where(x.isnan().any(dim=1), torch.nan, weight.input_scale)
    codes = int8_codes if weight.format is QuantFormat.INT8_CHANNEL else fp8_codes
    return codes(x, scales[:, None]), _told(scales)


def _told(scales: Tensor) -> Tensor:
    """An infinite scale becomes NaN: nothing of its token is left in the codes."""
    return torch.where(scales.isinf(), torch.nan, scales)


def _scale(largest: Tensor, code: float) -> Tensor:
    """Float32 scale from the largest magnitude; NaN stays NaN."""
    return (largest / code).clamp(min=SMALLEST_SCALE)


def fp8_codes(x: Tensor, scale: Tensor) -> Tensor:
    """Float32 values to e4m3 codes, saturating at 448; a NaN stays a NaN."""
    return (x / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def int8_codes(x: Tensor, scale: Tensor) -> Tensor:
    """Float32 values to codes -127 .. 127; a NaN becomes 0, and its token's scale tells."""
    return (x / scale).nan_to_num(0.0).round().clamp(-INT8_MAX, INT8_MAX).to(torch.int8)


def _block_amax(weight: Tensor) -> Tensor:
    rows, columns = weight.shape
    padded = F.pad(weight, (0, -columns % GROUP, 0, -rows % BLOCK)).abs()
    return padded.view(-(-rows // BLOCK), BLOCK, -1, GROUP).amax(dim=(1, 3))


def spread_blocks(scales: Tensor, rows: int, columns: int) -> Tensor:
    """[ceil(rows / 128), ceil(columns / 128)] to one scale per element [rows, columns]."""
    return scales.repeat_interleave(BLOCK, dim=0)[:rows].repeat_interleave(GROUP, dim=1)[:, :columns]


def _int4(weight: Tensor, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    outputs, inputs = weight.shape
    grouped = weight.view(outputs, inputs // GROUP, GROUP)
    scales = _scale(grouped.abs().amax(dim=2), 7.0).to(scale_dtype)
    codes = (grouped / scales.float()[:, :, None]).round().clamp(-8, 7).to(torch.int64) + 8
    return pack_int4(codes.view(outputs, inputs)), scales.t().contiguous()


def pack_int4(codes_MK: Tensor) -> Tensor:
    """Codes 0 .. 15 [M, K] to words [G, M, 16]."""
    outputs, inputs = codes_MK.shape
    nibbles = codes_MK.to(torch.int64).view(outputs, inputs // GROUP, 8, WORDS)
    shifts = torch.arange(0, 32, 4, device=codes_MK.device).view(1, 1, 8, 1)
    words = (nibbles << shifts).sum(dim=2)
    signed = torch.where(words >= 2**31, words - 2**32, words)
    return signed.to(torch.int32).transpose(0, 1).contiguous()


def unpack_int4(words: Tensor) -> Tensor:
    """Words [G, M, 16] to codes -8 .. 7, int8 [M, K]."""
    groups, outputs, _ = words.shape
    shifts = torch.arange(0, 32, 4, device=words.device, dtype=torch.int32).view(1, 1, 8, 1)
    nibbles = ((words.transpose(0, 1)[:, :, None, :] >> shifts) & 15) - 8
    return nibbles.to(torch.int8).reshape(outputs, groups * GROUP)


def decode_weight(weight: QuantizedWeight, dtype: torch.dtype, start: int = 0, end: int | None = None) -> Tensor:
    """Rows start .. end of the weight that the codes stand for, code times scale in `dtype` (float32 or float64)."""
    end = weight.num_outputs if end is None else end
    form, scales = weight.format, weight.scales.to(dtype)
    if form is QuantFormat.INT4_GROUP:
        per_input = scales[:, start:end].t().repeat_interleave(GROUP, dim=1)
        return unpack_int4(weight.codes[:, start:end]).to(dtype) * per_input
    codes = weight.codes[start:end].to(dtype)
    if form is QuantFormat.FP8_BLOCK:
        return codes * spread_blocks(scales, weight.num_outputs, weight.num_inputs)[start:end]
    return codes * (scales if form is QuantFormat.FP8_TENSOR else scales[start:end, None])
