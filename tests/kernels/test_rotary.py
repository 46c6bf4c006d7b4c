"""Rotary embedding: a rotation of each pair; all implementations against complex multiplication."""

import pytest
import torch

from penstock.kernels import ops
from penstock.kernels.cpu import rotary as cpu
from penstock.kernels.reference import rotary as reference


def expected(x, angles, *, interleaved=False):
    half = angles.shape[1]
    turned, rest = x[..., : 2 * half].double(), x[..., 2 * half :].double()
    first, second = (turned[..., ::2], turned[..., 1::2]) if interleaved else turned.chunk(2, -1)
    product = torch.complex(first, second) * torch.polar(torch.ones(1).double(), angles[:, None].double())
    if interleaved:
        return torch.cat((torch.stack((product.real, product.imag), -1).flatten(-2), rest), -1)
    return torch.cat((product.real, product.imag, rest), -1)


@pytest.mark.parametrize("implementation", [cpu, reference, ops])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("dim", "rotated"), [(2, 2), (48, 48), (80, 80), (64, 16), (80, 32)])
def test_rotary_is_a_complex_product(implementation, interleaved, dim, rotated):
    torch.manual_seed(0)
    x, angles = torch.randn(6, 3, dim), torch.randn(6, rotated // 2)
    before = x.clone()
    out = implementation.rotary(x, angles.cos(), angles.sin(), interleaved=interleaved)
    torch.testing.assert_close(out.double(), expected(x, angles, interleaved=interleaved), atol=1e-6, rtol=1e-6)
    assert torch.equal(x, before)


def test_views_of_a_larger_tensor_are_taken():
    x = torch.randn(4, 5, 8)
    angles = torch.randn(4, 4)
    part = ops.rotary(x[:, 1:3], angles.cos(), angles.sin())
    torch.testing.assert_close(part, reference.rotary(x[:, 1:3].clone(), angles.cos(), angles.sin()))
