"""The Triton product with float weights against float64: dtypes, odd shapes, split K, strides, neighbours."""

import pytest
import torch

pytest.importorskip("triton")

from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.kernels.errors import KernelInputError
from penstock.kernels.gpu import gemm, linear

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROUNDING = {torch.float32: 2**-23, torch.bfloat16: 2**-8, torch.float16: 2**-10}


def assert_product(out, x, weight, bias=None):
    """K00's bound for float32 sums."""
    exact = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    most = x.abs().max().double() * weight.abs().max().double() if x.numel() else 0
    bound = ROUNDING[out.dtype] * exact.abs() + x.shape[1] * 2**-24 * most * 2
    assert ((out.double() - exact).abs() <= bound).all()


@given(
    tokens=st.sampled_from([0, 1, 7, 16, 65]),
    inputs=st.sampled_from([1, 16, 48, 130, 1100]),
    outputs=st.sampled_from([1, 24, 100]),
    dtype=st.sampled_from(list(ROUNDING)),
    with_bias=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=25, deadline=None)
def test_linear(tokens, inputs, outputs, dtype, with_bias, seed):
    torch.manual_seed(seed)
    x = torch.randn(tokens, inputs, device=DEVICE).to(dtype)
    weight = torch.randn(outputs, inputs, device=DEVICE).to(dtype)
    bias = torch.randn(outputs, device=DEVICE).to(dtype) if with_bias else None
    out = linear.linear(x, linear.pack_weight(weight, bias))
    assert (out.shape, out.dtype) == ((tokens, outputs), dtype)
    assert_product(out, x, weight, bias)


@pytest.mark.parametrize(("split", "group"), [(1, 8), (2, 1), (8, 8)])
def test_every_split_and_order_of_tiles(split, group):
    torch.manual_seed(0)
    x, weight = torch.randn(40, 200, device=DEVICE), torch.randn(70, 200, device=DEVICE)
    bias, out = torch.randn(70, device=DEVICE), torch.empty(40, 70, device=DEVICE)
    config = {"BLOCK_T": 16, "BLOCK_M": 16, "BLOCK_K": 32, "GROUP_T": group, "SPLIT_K": split}
    gemm.multiply(gemm.Operands(x, weight, out, bias), {**config, "num_warps": 4, "num_stages": 2})
    assert_product(out, x, weight, bias)


def test_rows_of_a_wider_tensor_and_transposed_ones():
    torch.manual_seed(0)
    weight = torch.randn(20, 32, device=DEVICE)
    wide = torch.randn(5, 100, device=DEVICE)
    packed = linear.pack_weight(weight, None)
    assert_product(linear.linear(wide[:, 40:72], packed), wide[:, 40:72], weight)
    tall = torch.randn(32, 5, device=DEVICE).t()
    assert_product(linear.linear(tall, packed), tall, weight)
    turned = torch.randn(32, 20, device=DEVICE).t()
    assert_product(linear.linear(tall, linear.pack_weight(turned, None)), tall, turned)


def sparse(numbers):
    """That many bfloat16 numbers, of which only the pages that are touched take memory on a CPU."""
    try:
        return torch.empty(numbers, dtype=torch.bfloat16, device=DEVICE)
    except RuntimeError as error:
        pytest.skip(f"no address space for it: {error}")


def test_rows_far_apart_in_memory():
    # The stride fits 32 bits, the offset of row 2 does not.
    x = torch.as_strided(sparse((3 << 30) + 16), (3, 16), (3 << 29, 1))
    x.copy_(torch.randn(3, 16))
    weight = torch.randn(8, 16, device=DEVICE).to(torch.bfloat16)
    assert_product(linear.linear(x, linear.pack_weight(weight, None)), x, weight)


def test_a_token_does_not_depend_on_its_neighbours():
    torch.manual_seed(0)
    x, weight = torch.randn(16, 300, device=DEVICE), torch.randn(24, 300, device=DEVICE)
    packed = linear.pack_weight(weight, None)
    together = linear.linear(x, packed)
    for tokens in (1, 5):
        assert torch.equal(linear.linear(x[:tokens], packed), together[:tokens])


def test_wrong_inputs_are_told():
    packed = linear.pack_weight(torch.randn(4, 8, device=DEVICE), None)
    for x in (torch.randn(2, 7, device=DEVICE), torch.randn(8, device=DEVICE), torch.randn(2, 8).half().to(DEVICE)):
        with pytest.raises(KernelInputError, match="linear: x"):
            linear.linear(x, packed)
    with pytest.raises(KernelInputError, match="pack_weight: bias"):
        linear.pack_weight(torch.randn(4, 8, device=DEVICE), torch.randn(5, device=DEVICE))
