"""Matrix products with quantised weights on the GPU: quantise the tokens, multiply codes, apply the scales at the end.

e4m3 codes go to the tensor cores as they are where the card knows that type (NVIDIA from compute capability 8.9) and
are decoded to bfloat16, exactly, where it does not. Called through `kernels/ops.py`; knows only tensors. The formats
live in `kernels/quantize.py`. Legend: T tokens, K inputs, M outputs.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from penstock.kernels import expect, quantize
from penstock.kernels.gpu import gemm, int4_gemm
from penstock.kernels.gpu.linear import FEW_TOKENS
from penstock.kernels.gpu.matrix_tiles import BLOCK_SCALES, CHANNEL_SCALES, ONE_SCALE
from penstock.kernels.gpu.quantize_tokens import quantize_tokens
from penstock.kernels.gpu.tuning import config_for
from penstock.kernels.packing import GROUP, QuantFormat, QuantizedWeight

_SCALING = {
    QuantFormat.FP8_TENSOR: ONE_SCALE.value,
    QuantFormat.FP8_CHANNEL: CHANNEL_SCALES.value,
    QuantFormat.FP8_BLOCK: BLOCK_SCALES.value,
    QuantFormat.INT8_CHANNEL: CHANNEL_SCALES.value,
}

AOT_CASES = (
    *gemm.aot_cases("fp8-tensor", "fp8e4nv", ONE_SCALE.value, gemm.Kind.CODES)[:1],
    *gemm.aot_cases("fp8-channel", "fp8e4nv", CHANNEL_SCALES.value, gemm.Kind.CODES),
    *gemm.aot_cases("fp8-block", "fp8e4nv", BLOCK_SCALES.value, gemm.Kind.BLOCKS),
    *gemm.aot_cases("decoded-fp8-channel", "u8", CHANNEL_SCALES.value, gemm.Kind.DECODED),
    *gemm.aot_cases("decoded-fp8-block", "u8", BLOCK_SCALES.value, gemm.Kind.DECODED),
    *gemm.aot_cases("int8-channel", "i8", CHANNEL_SCALES.value, gemm.Kind.CODES),
    *gemm.reduce_cases("fp8-tensor", "fp32", "*bf16", ONE_SCALE.value),
    *gemm.reduce_cases("fp8-channel", "fp32", "*bf16", CHANNEL_SCALES.value),
    *gemm.reduce_cases("int8-channel", "i32", "*bf16", CHANNEL_SCALES.value),
)


def quantize_weight(
    weight_MK: Tensor, format: QuantFormat, bias: Tensor | None = None, input_scale: float | None = None
) -> QuantizedWeight:
    """See `ops.quantize_weight`. Once, at load: torch's operators do on the GPU what they do elsewhere."""
    return quantize.quantize_weight(weight_MK, format, bias, input_scale)


@functools.lru_cache(maxsize=16)
def _knows_e4m3(device: torch.device) -> bool:
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 9)


def default_config(tokens: int, outputs: int, inputs: int, kind: gemm.Kind) -> dict[str, int]:
    """What serves a shape that nobody tuned; the vendor's product takes many tokens where it takes the operands."""
    return {**gemm.default_config(tokens, outputs, inputs, kind), "vendor": int(tokens > FEW_TOKENS)}


def _vendor_takes(x: Tensor, weight: QuantizedWeight, kind: gemm.Kind) -> bool:
    """Whether torch's scaled product serves: e4m3 with one scale per row and column, bfloat16 results, whole words."""
    whole = weight.num_inputs % 16 == 0 and weight.num_outputs % 16 == 0
    e4m3 = weight.format in (QuantFormat.FP8_TENSOR, QuantFormat.FP8_CHANNEL) and kind is gemm.Kind.CODES
    return e4m3 and whole and x.dtype is torch.bfloat16


def quantized_linear(x_TK: Tensor, weight: QuantizedWeight) -> Tensor:
    """See `ops.quantized_linear`."""
    quantize.check_input(x_TK, weight)
    expect.dtype("quantized_linear", "x", x_TK, torch.float32, torch.bfloat16, torch.float16)
    tokens, outputs, inputs = len(x_TK), weight.num_outputs, weight.num_inputs
    out = x_TK.new_empty(tokens, outputs)
    if not tokens:
        return out
    x = x_TK if x_TK.stride(-1) == 1 else x_TK.contiguous()
    key = {"T": tokens, "M": outputs, "K": inputs}
    if weight.format is QuantFormat.INT4_GROUP:
        config = config_for("int4_gemm", key, int4_gemm.default_config(tokens, outputs, inputs // GROUP))
        int4_gemm.multiply_int4(x, weight.codes, weight.scales, out, weight.bias, config)
        return out
    codes, scales = quantize_tokens(x, weight)
    stored = weight.codes
    kind = gemm.Kind.BLOCKS if weight.format is QuantFormat.FP8_BLOCK else gemm.Kind.CODES
    if stored.dtype is torch.float8_e4m3fn and not _knows_e4m3(x.device):
        codes, stored, kind = codes.view(torch.uint8), stored.view(torch.uint8), gemm.Kind.DECODED
    config = config_for(f"gemm_{weight.format.value}", key, default_config(tokens, outputs, inputs, kind))
    if config["vendor"] and _vendor_takes(x, weight, kind):
        # Not the faster accumulation of 14 bits.
        return torch._scaled_mm(
            codes,
            stored.t(),
            scales[:, None],
            weight.scales.expand(outputs).contiguous()[None, :],
            bias=None if weight.bias is None else weight.bias.to(x.dtype),
            out_dtype=x.dtype,
            use_fast_accum=False,
        )
    if weight.format is QuantFormat.FP8_BLOCK:
        # One scale covers a chunk of K and a tile of outputs, so neither may cross a block.
        config |= {"BLOCK_K": min(config["BLOCK_K"], GROUP), "BLOCK_M": min(config["BLOCK_M"], GROUP)}
    scaling = _SCALING[weight.format]
    gemm.multiply(gemm.Operands(codes, stored, out, weight.bias, scales, weight.scales, scaling), config)
    return out
