"""Matrix products with quantised weights on the CPU: INT8 by oneDNN's integer product, the others decoded in slices.

A slice of the weight is decoded to float32, multiplied and dropped, so that memory stays that of the codes.
Called through `kernels/ops.py`; knows only tensors. Legend: T tokens, K inputs, M outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from penstock.kernels import quantize
from penstock.kernels.packing import GROUP, QuantFormat, QuantizedWeight

# Decoded at a time: 4 MB of float32 stay in the second-level caches of two cores.
_SLICE_ELEMENTS = 1 << 20


def quantize_weight(
    weight_MK: Tensor, format: QuantFormat, bias: Tensor | None = None, input_scale: float | None = None
) -> QuantizedWeight:
    """See `ops.quantize_weight`."""
    return quantize.quantize_weight(weight_MK, format, bias, input_scale)


def quantized_linear(x_TK: Tensor, weight: QuantizedWeight) -> Tensor:
    """See `ops.quantized_linear`."""
    quantize.check_input(x_TK, weight)
    if weight.format is QuantFormat.INT8_CHANNEL:
        out = _int8(x_TK, weight)
    elif weight.format in (QuantFormat.INT4_GROUP, QuantFormat.FP8_BLOCK):
        out = _in_slices(_activations(x_TK, weight), weight)
    else:
        codes, scales = quantize.quantize_tokens(x_TK, weight)
        out = _in_slices(codes.float(), weight) * scales[:, None]
    if weight.bias is not None:
        out += weight.bias.float()
    return out.to(x_TK.dtype)


def _activations(x_TK: Tensor, weight: QuantizedWeight) -> Tensor:
    if weight.format is QuantFormat.INT4_GROUP:
        return x_TK.float()
    codes, scales = quantize.quantize_tokens(x_TK, weight)
    return codes.float() * scales.repeat_interleave(GROUP, dim=1)[:, : weight.num_inputs]


def _int8(x_TK: Tensor, weight: QuantizedWeight) -> Tensor:
    codes, scales = quantize.quantize_tokens(x_TK, weight)
    if not len(codes):
        return x_TK.new_zeros(0, weight.num_outputs, dtype=torch.float32)
    sums: Tensor = torch._int_mm(codes, weight.codes.t())
    return sums.float() * (scales[:, None] * weight.scales)


def _in_slices(inputs_TK: Tensor, weight: QuantizedWeight) -> Tensor:
    out = inputs_TK.new_empty(len(inputs_TK), weight.num_outputs)
    rows = max(1, _SLICE_ELEMENTS // weight.num_inputs)
    for start in range(0, weight.num_outputs, rows):
        end = min(start + rows, weight.num_outputs)
        torch.mm(inputs_TK, quantize.decode_weight(weight, torch.float32, start, end).t(), out=out[:, start:end])
    return out
