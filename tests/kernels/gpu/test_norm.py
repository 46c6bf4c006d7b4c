"""RMS norm in Triton against the formula in float64: widths, rows, strides, narrow and wide weights, refusals."""

import pytest
import torch

pytest.importorskip("triton")

from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.kernels.errors import KernelInputError
from penstock.kernels.gpu import norm
from penstock.kernels.reference import norm as reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def formula(x, weight, eps):
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()


def assert_rounded(out, exact):
    """Within half a unit in the last place of the result's dtype, and float32's error on the way there."""
    bound = exact.abs() * (ROUNDING[out.dtype] + 1e-6) + 1e-7
    assert ((out.double() - exact).abs() <= bound).all()


@given(
    rows=st.sampled_from([1, 2, 7, 19]),
    heads=st.sampled_from([0, 1, 3]),
    width=st.sampled_from([1, 7, 48, 64, 80, 130]),
    dtype=st.sampled_from(list(ROUNDING)),
    wide_weight=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=25, deadline=None)
def test_rms_norm(rows, heads, width, dtype, wide_weight, seed):
    torch.manual_seed(seed)
    shape = (rows, heads, width) if heads else (rows, width)
    x, weight = 3 * torch.randn(shape, device=DEVICE), torch.randn(shape[1:] if heads else (width,), device=DEVICE)
    x, weight = x.to(dtype), weight if wide_weight else weight.to(dtype)
    out = norm.rms_norm(x, weight, 1e-5)
    assert out.dtype == dtype
    assert out.is_contiguous()
    assert_rounded(out, formula(x, weight, 1e-5))


@pytest.mark.parametrize("dtype", list(ROUNDING))
def test_add_rms_norm_rounds_the_sum_as_torch_does(dtype):
    torch.manual_seed(1)
    x, residual, weight = (torch.randn(shape, device=DEVICE).to(dtype) for shape in ((5, 72), (5, 72), (72,)))
    out, total = norm.add_rms_norm(x, residual, weight, 1e-6)
    assert torch.equal(total, x + residual)
    assert_rounded(out, formula(total, weight, 1e-6))


def test_strided_heads_of_a_joint_projection_are_read_in_place():
    torch.manual_seed(2)
    joint = torch.randn(6, 5, 32, device=DEVICE)
    weight = torch.randn(3, 32, device=DEVICE)
    assert_rounded(norm.rms_norm(joint[:, 1:4], weight, 1e-6), formula(joint[:, 1:4], weight, 1e-6))
    rows = torch.randn(6, 100, device=DEVICE)[:, 10:58]
    assert_rounded(norm.rms_norm(rows, weight[0, :1].expand(48), 1e-6), formula(rows, weight[0, :1].expand(48), 1e-6))


def test_strides_beyond_two_to_the_31_do_not_wrap():
    storage = torch.empty(1, dtype=torch.float32, device=DEVICE)
    x = torch.randn(1, 16, device=DEVICE).as_strided((1, 16), (2**33, 1))
    assert storage.numel() == 1
    assert_rounded(
        norm.rms_norm(x, torch.ones(16, device=DEVICE), 1e-6), formula(x, torch.ones(16, device=DEVICE), 1e-6)
    )


def test_many_rows_share_a_program():
    x = torch.randn(norm.default_config(4096, 16)["ROWS"] * 2 + 3, 16, device=DEVICE)
    wide = torch.cat([x] * (4096 // len(x) + 1))
    assert torch.equal(norm.rms_norm(wide, torch.ones(16, device=DEVICE), 1e-6)[: len(x)], reference_like(x))


def reference_like(x):
    return norm.rms_norm(x, torch.ones(x.shape[1], device=x.device), 1e-6)


def test_a_row_that_is_not_a_number_spoils_no_other_and_zeros_stay_zero():
    x = torch.randn(3, 24, device=DEVICE)
    x[1, 5], x[2] = float("nan"), 0
    out = norm.rms_norm(x, torch.ones(24, device=DEVICE), 1e-6)
    assert out[1].isnan().all()
    torch.testing.assert_close(out[[0, 2]], reference.rms_norm(x[[0, 2]], torch.ones(24, device=DEVICE), 1e-6))
    assert not out[2].any()


def test_no_rows_at_all():
    out, total = norm.add_rms_norm(
        *(torch.empty(0, 8, device=DEVICE) for _ in range(2)), torch.ones(8, device=DEVICE), 1e-6
    )
    assert out.shape == total.shape == (0, 8)


@pytest.mark.parametrize(
    ("argument", "x", "weight"),
    [
        ("x", torch.zeros(3, 8, dtype=torch.int64), torch.ones(8)),
        ("x", torch.zeros(3, 0), torch.ones(0)),
        ("weight", torch.zeros(3, 8), torch.ones(7)),
        ("weight", torch.zeros(3, 2, 8), torch.ones(3, 8)),
        ("weight", torch.zeros(3, 8), torch.ones(8, dtype=torch.int32)),
    ],
)
def test_wrong_arguments_are_named(argument, x, weight):
    with pytest.raises(KernelInputError) as refusal:
        norm.rms_norm(x, weight, 1e-6)
    assert (refusal.value.op, refusal.value.argument) == ("rms_norm", argument)
    with pytest.raises(KernelInputError):
        norm.add_rms_norm(torch.zeros(3, 8), torch.zeros(2, 8), torch.ones(8), 1e-6)
