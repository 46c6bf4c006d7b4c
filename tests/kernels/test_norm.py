"""RMS norm: both implementations against the formula in float64."""

import pytest
import torch

from penstock.kernels import ops
from penstock.kernels.cpu import norm as cpu
from penstock.kernels.reference import norm as reference


def formula(x, weight, eps):
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()


@pytest.mark.parametrize("implementation", [cpu, reference, ops])
@pytest.mark.parametrize(("shape", "weight_shape"), [((5, 48), (48,)), ((1, 7), (7,)), ((3, 4, 16), (4, 16))])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_rms_norm(implementation, shape, weight_shape, dtype, tolerance):
    torch.manual_seed(0)
    x, weight = torch.randn(shape).to(dtype), torch.randn(weight_shape).to(dtype)
    out = implementation.rms_norm(x, weight, 1e-5)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), formula(x, weight, 1e-5), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("implementation", [cpu, reference, ops])
def test_a_float32_weight_is_not_rounded_to_the_narrow_dtype_of_the_input(implementation):
    torch.manual_seed(0)
    x, weight = torch.randn(64, 48).bfloat16(), 1 + torch.randn(48) / 300  # bfloat16 has steps of 1/128 there
    out = implementation.rms_norm(x, weight, 1e-5)
    assert out.dtype == torch.bfloat16
    expected = formula(x, weight, 1e-5)
    assert ((out.double() - expected).abs() <= expected.abs() * (2**-8 + 1e-6)).all()


@pytest.mark.parametrize("implementation", [cpu, reference, ops])
def test_add_rms_norm_returns_the_sum_too(implementation):
    x, residual, weight = torch.randn(4, 8), torch.randn(4, 8), torch.randn(8)
    out, total = implementation.add_rms_norm(x, residual, weight, 1e-6)
    torch.testing.assert_close(total, x + residual)
    torch.testing.assert_close(out.double(), formula(x + residual, weight, 1e-6), atol=1e-6, rtol=1e-6)


def test_the_reference_keeps_float64():
    x = torch.randn(2, 8, dtype=torch.float64)
    torch.testing.assert_close(
        ops.rms_norm(x, torch.ones(8), 1e-6), formula(x, torch.ones(8), 1e-6), atol=1e-14, rtol=1e-14
    )
