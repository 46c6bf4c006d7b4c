"""Matrix product with a weight of floats on the GPU: Triton for few tokens, the vendor's library for many.

A step of decode reads the whole weight for a handful of tokens, where a split product reads fastest; from some number
of tokens on the vendor's kernels lead. The tuned table says where. Called through `kernels/ops.py`; knows only tensors.
Legend: T tokens, K inputs, M outputs.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from penstock.kernels import expect
from penstock.kernels.gpu.gemm import Kind, Operands, aot_cases, default_config, multiply, reduce_cases
from penstock.kernels.gpu.tuning import config_for
from penstock.kernels.packing import PackedWeight

# Without a tuned entry: more tokens than this go to the vendor's library.
FEW_TOKENS = 64

AOT_CASES = (
    *aot_cases("bf16", "bf16", 0, Kind.HALVES),
    *aot_cases("fp16", "fp16", 0, Kind.HALVES)[:1],
    *aot_cases("fp32", "fp32", 0, Kind.FLOATS),
    *reduce_cases("bf16", "fp32", "*bf16", 0),
)


def pack_weight(weight_MK: Tensor, bias: Tensor | None) -> PackedWeight:
    """See `ops.pack_weight`; the weight keeps its order."""
    outputs, inputs = expect.weight("pack_weight", weight_MK, bias).shape
    own = None if bias is None else bias.to(weight_MK.dtype)
    return PackedWeight(weight_MK.contiguous(), own, outputs, inputs, rearranged=False)


def linear(x_TK: Tensor, packed: PackedWeight) -> Tensor:
    """See `ops.linear`."""
    expect.product("linear", x_TK, packed)
    tokens, outputs, inputs = len(x_TK), packed.num_outputs, packed.num_inputs
    kind = Kind.FLOATS if x_TK.element_size() == 4 else Kind.HALVES
    default = {**default_config(tokens, outputs, inputs, kind), "vendor": int(tokens > FEW_TOKENS)}
    config = config_for("linear", {"T": tokens, "M": outputs, "K": inputs}, default)
    if config["vendor"] and x_TK.is_cuda:
        return F.linear(x_TK, packed.weight, packed.bias)
    out = x_TK.new_empty(tokens, outputs)
    if out.numel():
        rows = x_TK if x_TK.stride(-1) == 1 else x_TK.contiguous()
        multiply(Operands(rows, packed.weight, out, packed.bias), config)
    return out
