"""Gated activations in Triton against float64: all kinds, odd widths, far ends of the range."""

import pytest
import torch

pytest.importorskip("triton")

from penstock.kernels.errors import KernelInputError
from penstock.kernels.gpu import activation

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KINDS = {
    "silu_and_mul": lambda z: z * torch.sigmoid(z),
    "gelu_and_mul": lambda z: torch.nn.functional.gelu(z, approximate="tanh"),
    "gelu_erf_and_mul": torch.nn.functional.gelu,
}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(
    ("dtype", "rounding"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-8), (torch.float16, 2**-11)]
)
@pytest.mark.parametrize("width", [1, 7, 48, 2100])
def test_against_float64(name, dtype, rounding, width):
    torch.manual_seed(width)
    x = (4 * torch.randn(3, 2 * width, device=DEVICE)).to(dtype)
    gate, up = x.double().chunk(2, -1)
    out = getattr(activation, name)(x)
    exact = KINDS[name](gate) * up
    assert out.dtype == dtype
    tiny = 2.0**-25 if dtype is torch.float16 else 0.0  # half a step of float16 near zero
    # The error unit loses float32's digits where it nearly cancels, far on the negative side.
    assert ((out.double() - exact).abs() <= exact.abs() * (rounding + 1e-6) + 2e-6 * up.abs() + tiny).all()


@pytest.mark.parametrize("name", KINDS)
def test_far_ends_are_defined(name):
    x = torch.tensor([[-3e4, -200.0, 0.0, 200.0, 3e4, 2.0, 2.0, 2.0, 2.0, 2.0]], device=DEVICE)
    out = getattr(activation, name)(x)
    torch.testing.assert_close(out, torch.tensor([[0.0, 0.0, 0.0, 400.0, 6e4]], device=DEVICE), atol=1e-6, rtol=1e-6)


def test_rows_of_a_wider_tensor_and_no_rows():
    x = torch.randn(5, 40, device=DEVICE)[:, 4:24]
    assert torch.equal(activation.silu_and_mul(x), activation.silu_and_mul(x.contiguous()))
    assert activation.silu_and_mul(x[:0]).shape == (0, 10)


@pytest.mark.parametrize("x", [torch.zeros(2, 5), torch.zeros(2, 4, dtype=torch.int32), torch.zeros(())])
def test_wrong_arguments_are_named(x):
    with pytest.raises(KernelInputError, match="silu_and_mul: gate_up"):
        activation.silu_and_mul(x)
