"""Packed matrix products: both implementations against float64, with the error bound of the arithmetic used."""

import pytest
import torch

from penstock.kernels import ops
from penstock.kernels.cpu import linear as cpu
from penstock.kernels.reference import linear as reference


@pytest.mark.parametrize("implementation", [cpu, reference, ops])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "inputs", "outputs"), [(1, 16, 24), (7, 48, 100), (33, 240, 64), (2, 5, 3)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear(implementation, dtype, tokens, inputs, outputs, with_bias):
    torch.manual_seed(0)
    x, weight = torch.randn(tokens, inputs).to(dtype), torch.randn(outputs, inputs).to(dtype)
    bias = torch.randn(outputs).to(dtype) if with_bias else None
    packed = implementation.pack_weight(weight, bias)
    assert (packed.num_outputs, packed.num_inputs) == (outputs, inputs)
    out = implementation.linear(x, packed)
    expected = x.double() @ weight.double().T + (bias.double() if with_bias else 0)
    rounding = {torch.float32: 2**-23, torch.bfloat16: 2**-8, torch.float16: 2**-10}[dtype]
    bound = rounding * expected.abs() + inputs * 2**-22 * x.abs().max().double() * weight.abs().max().double()
    assert out.dtype == dtype
    assert ((out.double() - expected).abs() <= bound).all()
