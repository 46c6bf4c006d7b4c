"""Matrix products with quantised weights, written for plainness: decode everything, then one product.

Called through `kernels/ops.py`; knows only tensors. The formats live in `kernels/quantize.py`.
Legend: T tokens, K inputs, M outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from penstock.kernels import quantize
from penstock.kernels.packing import GROUP, QuantFormat, QuantizedWeight


def quantize_weight(
    weight_MK: Tensor, format: QuantFormat, bias: Tensor | None = None, input_scale: float | None = None
) -> QuantizedWeight:
    """See `ops.quantize_weight`."""
    return quantize.quantize_weight(weight_MK, format, bias, input_scale)


def quantized_linear(x_TK: Tensor, weight: QuantizedWeight) -> Tensor:
    """See `ops.quantized_linear`; float32 arithmetic at least, after the activations were quantised in float32."""
    quantize.check_input(x_TK, weight)
    dtype = torch.promote_types(x_TK.dtype, torch.float32)
    inputs = x_TK.to(dtype)
    if weight.format is not QuantFormat.INT4_GROUP:
        codes, scales = quantize.quantize_tokens(x_TK, weight)
        per_input = scales.to(dtype)[:, None]
        if weight.format is QuantFormat.FP8_BLOCK:
            per_input = scales.to(dtype).repeat_interleave(GROUP, dim=1)[:, : weight.num_inputs]
        inputs = codes.to(dtype) * per_input
    out = inputs @ quantize.decode_weight(weight, dtype).t()
    return (out if weight.bias is None else out + weight.bias.to(dtype)).to(x_TK.dtype)
