"""C++ matrix product: float64 bounds for any shape, rows that do not depend on each other, refusals."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from penstock.kernels.errors import KernelInputError
from penstock.kernels.native import linear as native

UNITS = {torch.float32: 2**-24, torch.bfloat16: 2**-8}


@given(
    st.integers(0, 40), st.integers(1, 150), st.integers(1, 200), st.sampled_from(list(UNITS)), st.booleans(),
    st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_against_float64(level, tokens, inputs, outputs, dtype, biased, seed):
    torch.manual_seed(seed)
    x, weight = torch.randn(tokens, inputs).to(dtype), torch.randn(outputs, inputs).to(dtype)
    bias = torch.randn(outputs).to(dtype) if biased else None
    y = native.linear(x, native.pack_weight(weight, bias)).double()
    truth = x.double() @ weight.double().t() + (0 if bias is None else bias.double())
    assert y.shape == truth.shape
    scale = (x.double().abs() @ weight.double().abs().t()).clamp(min=1e-3)
    assert ((y - truth).abs() <= UNITS[dtype] * truth.abs() + inputs * 2**-23 * scale + 1e-6).all()


@pytest.mark.parametrize("dtype", UNITS)
def test_a_row_does_not_depend_on_the_others(level, dtype):
    torch.manual_seed(0)
    x, packed = torch.randn(700, 320).to(dtype), native.pack_weight(torch.randn(200, 320).to(dtype), None)
    together = native.linear(x, packed)
    for rows in (slice(0, 1), slice(3, 10), slice(100, 500)):
        assert torch.equal(native.linear(x[rows], packed), together[rows])


def test_strided_rows(level):
    x = torch.randn(9, 200)
    packed = native.pack_weight(torch.randn(70, 64), None)
    assert torch.equal(native.linear(x[:, 64:128], packed), native.linear(x[:, 64:128].contiguous(), packed))
    assert torch.equal(native.linear(x[::2, :64], packed), native.linear(x[::2, :64].contiguous(), packed))
    assert torch.equal(native.linear(x.t()[:64].t(), packed), native.linear(x[:, :64].contiguous(), packed))


def test_wrong_inputs_are_refused():
    packed = native.pack_weight(torch.randn(70, 64), None)
    with pytest.raises(KernelInputError, match="x: 65 inputs; the weight has 64"):
        native.linear(torch.randn(2, 65), packed)
    with pytest.raises(KernelInputError, match="bfloat16"):
        native.linear(torch.randn(2, 64).bfloat16(), packed)
