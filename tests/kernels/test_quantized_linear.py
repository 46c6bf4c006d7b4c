"""Products with quantised weights: torch implementations against float64 of the same decoded codes (K00's bound)."""

import pytest
import torch
from fakes.quantized_exact import ROUNDING, exact
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.kernels import ops, quantize
from penstock.kernels.cpu import quantized_linear as cpu
from penstock.kernels.errors import KernelInputError
from penstock.kernels.packing import GROUP, QuantFormat
from penstock.kernels.reference import quantized_linear as reference


@given(
    form=st.sampled_from(list(QuantFormat)),
    dtype=st.sampled_from(list(ROUNDING)),
    tokens=st.sampled_from([0, 1, 7, 16, 65]),
    outputs=st.sampled_from([1, 24, 130]),
    groups=st.integers(1, 3),
    odd=st.sampled_from([0, 3]),
    with_bias=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_against_float64_of_the_codes(form, dtype, tokens, outputs, groups, odd, with_bias, seed):
    torch.manual_seed(seed)
    inputs = GROUP * groups + (0 if form is QuantFormat.INT4_GROUP else odd)
    x, weight = torch.randn(tokens, inputs).to(dtype), torch.randn(outputs, inputs).to(dtype)
    weight[0], x[-1:] = 0, 0
    packed = ops.quantize_weight(weight, form, torch.randn(outputs).to(dtype) if with_bias else None)
    expected, bound = exact(x, packed)
    for implementation in (cpu, reference, ops):
        out = implementation.quantized_linear(x, packed)
        assert out.dtype == dtype
        assert out.shape == (tokens, outputs)
        assert ((out.double() - expected).abs() <= bound).all(), implementation


def test_float64_is_served():
    x, weight = torch.randn(3, 128).double(), torch.randn(5, 128).double()
    for form in QuantFormat:
        out = ops.quantized_linear(x, ops.quantize_weight(weight, form))
        assert out.dtype == torch.float64
        assert (out - x @ weight.T).abs().max() < 5


def test_a_fixed_scale_of_the_activations():
    x, weight = torch.randn(4, 64), torch.randn(8, 64)
    packed = ops.quantize_weight(weight, QuantFormat.FP8_TENSOR, None, 0.25)
    codes = (x / 0.25).clamp(-448, 448).to(torch.float8_e4m3fn).double() * 0.25
    expected = codes @ quantize.decode_weight(packed, torch.float64).T
    assert (ops.quantized_linear(x, packed) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("form", [form for form in QuantFormat if form is not QuantFormat.INT4_GROUP])
@pytest.mark.parametrize("implementation", [cpu, reference])
def test_a_strange_token_spoils_its_own_row_only(implementation, form):
    x = torch.randn(3, 128)
    packed = implementation.quantize_weight(torch.randn(8, 128), form)
    clean = implementation.quantized_linear(x, packed)
    for strange in (float("nan"), float("inf")):
        x[1, 5] = strange
        out = implementation.quantized_linear(x, packed)
        assert out[1].isnan().all()
        assert torch.equal(out[[0, 2]], clean[[0, 2]])


def test_wrong_inputs_are_told():
    packed = ops.quantize_weight(torch.randn(8, 128), QuantFormat.FP8_CHANNEL)
    for x in (torch.randn(3, 127), torch.randn(128), torch.ones(3, 128, dtype=torch.int32)):
        with pytest.raises(KernelInputError, match="quantized_linear: x"):
            ops.quantized_linear(x, packed)
