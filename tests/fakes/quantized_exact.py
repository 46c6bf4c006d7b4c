"""What a product with quantised weights must give: float64 of the same codes, and how far float32 may be from it."""

import torch

from penstock.kernels import quantize
from penstock.kernels.packing import GROUP, QuantFormat

ROUNDING = {torch.float32: 2**-23, torch.bfloat16: 2**-8, torch.float16: 2**-10}


def exact(x, weight):
    """(result, bound): float64 of the codes, and what float32 sums and the rounding of the result may add."""
    decoded = quantize.decode_weight(weight, torch.float64)
    inputs = x.double()
    if weight.format is not QuantFormat.INT4_GROUP:
        codes, scales = quantize.quantize_tokens(x, weight)
        block = weight.format is QuantFormat.FP8_BLOCK
        spread = scales.repeat_interleave(GROUP, 1)[:, : weight.num_inputs] if block else scales[:, None]
        inputs = codes.double() * spread.double()
    out = inputs @ decoded.T + (0 if weight.bias is None else weight.bias.double())
    most = (inputs.abs().amax() if inputs.numel() else 0) * decoded.abs().amax()
    return out, ROUNDING[x.dtype] * out.abs() + weight.num_inputs * 2**-24 * most * 2
