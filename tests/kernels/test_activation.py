"""Gated activation: both implementations against the formula in float64."""

import pytest
import torch

from penstock.kernels import ops
from penstock.kernels.cpu import activation as cpu
from penstock.kernels.reference import activation as reference


@pytest.mark.parametrize("implementation", [cpu, reference, ops])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 3e-2)])
def test_silu_and_mul(implementation, dtype, tolerance):
    torch.manual_seed(0)
    x = torch.randn(5, 14).to(dtype)
    before = x.clone()
    gate, up = x.double().chunk(2, -1)
    out = implementation.silu_and_mul(x)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), gate * torch.sigmoid(gate) * up, atol=tolerance, rtol=tolerance)
    assert torch.equal(x, before)


@pytest.mark.parametrize("implementation", [cpu, reference, ops])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 3e-2)])
def test_gelu_and_mul(implementation, dtype, tolerance):
    torch.manual_seed(0)
    x = (3 * torch.randn(5, 14)).to(dtype)
    before = x.clone()
    gate, up = x.double().chunk(2, -1)
    expected = gate / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3))) * up
    out = implementation.gelu_and_mul(x)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)
    assert torch.equal(x, before)


@pytest.mark.parametrize("implementation", [cpu, reference, ops])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 3e-2)])
def test_gelu_erf_and_mul(implementation, dtype, tolerance):
    torch.manual_seed(0)
    x = (3 * torch.randn(5, 14)).to(dtype)
    before = x.clone()
    gate, up = x.double().chunk(2, -1)
    out = implementation.gelu_erf_and_mul(x)
    assert out.dtype == dtype
    torch.testing.assert_close(
        out.double(), gate / 2 * (1 + torch.erf(gate / 2**0.5)) * up, atol=tolerance, rtol=tolerance
    )
    assert torch.equal(x, before)
