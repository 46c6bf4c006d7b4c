"""Rotary embedding in Triton against the reference in float64: both pairings, partial rotation, strides."""

import pytest
import torch

pytest.importorskip("triton")

from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.kernels.errors import KernelInputError
from penstock.kernels.gpu import rotary
from penstock.kernels.reference import rotary as reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@given(
    tokens=st.sampled_from([1, 3]),
    heads=st.sampled_from([1, 5, 8]),
    size=st.sampled_from([(2, 2), (48, 48), (80, 80), (64, 64), (80, 32), (64, 6), (96, 24)]),
    interleaved=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 99),
)
@settings(max_examples=30, deadline=None)
def test_against_the_reference(tokens, heads, size, interleaved, dtype, seed):
    torch.manual_seed(seed)
    dim, rotated = size
    joint = torch.randn(tokens, heads + 2, dim, device=DEVICE).to(dtype)
    x, angles = joint[:, 1 : heads + 1], 100 * torch.rand(tokens, rotated // 2, device=DEVICE)
    cos, sin = angles.cos(), angles.sin()
    out = rotary.rotary(x, cos, sin, interleaved=interleaved)
    exact = reference.rotary(x.double(), cos.double(), sin.double(), interleaved=interleaved)
    rounding = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    assert out.dtype == dtype
    assert ((out.double() - exact).abs() <= exact.abs() * rounding + 1e-6 * x.double().abs().max()).all()
    assert torch.equal(out[..., rotated:], x[..., rotated:])


def test_no_tokens():
    out = rotary.rotary(*(torch.empty(shape, device=DEVICE) for shape in ((0, 2, 8), (0, 4), (0, 4))))
    assert out.shape == (0, 2, 8)


@pytest.mark.parametrize(
    ("argument", "shapes"),
    [
        ("x_THD", ((3, 8), (3, 4), (3, 4))),
        ("cos", ((3, 2, 8), (2, 4), (3, 4))),
        ("sin", ((3, 2, 8), (3, 4), (3, 3))),
        ("cos", ((3, 2, 8), (3, 5), (3, 5))),
        ("cos", ((3, 2, 8), (3, 0), (3, 0))),
    ],
)
def test_wrong_arguments_are_named(argument, shapes):
    with pytest.raises(KernelInputError) as refusal:
        rotary.rotary(*(torch.zeros(shape) for shape in shapes))
    assert refusal.value.argument == argument
