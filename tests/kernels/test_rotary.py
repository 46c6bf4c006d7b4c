"""Rotary embedding: a rotation of each (j, j + D/2) pair; both implementations against complex multiplication."""

import pytest
import torch

from penstock.kernels import ops
from penstock.kernels.cpu import rotary as cpu
from penstock.kernels.reference import rotary as reference


@pytest.mark.parametrize("implementation", [cpu, reference, ops])
@pytest.mark.parametrize("dim", [2, 48, 80])
def test_rotary_is_a_complex_product(implementation, dim):
    torch.manual_seed(0)
    x, angles = torch.randn(6, 3, dim), torch.randn(6, dim // 2)
    first, second = x.double().chunk(2, -1)
    turned = torch.complex(first, second) * torch.polar(torch.ones(6, 1, dim // 2).double(), angles[:, None].double())
    expected = torch.cat((turned.real, turned.imag), -1)
    before = x.clone()
    out = implementation.rotary(x, angles.cos(), angles.sin())
    torch.testing.assert_close(out.double(), expected, atol=1e-6, rtol=1e-6)
    assert torch.equal(x, before)


def test_views_of_a_larger_tensor_are_taken():
    x = torch.randn(4, 5, 8)
    angles = torch.randn(4, 4)
    part = ops.rotary(x[:, 1:3], angles.cos(), angles.sin())
    torch.testing.assert_close(part, reference.rotary(x[:, 1:3].clone(), angles.cos(), angles.sin()))
