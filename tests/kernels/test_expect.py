"""What the products demand of their tensors: every refusal names operation and argument."""

import pytest
import torch

from penstock.kernels import expect, ops
from penstock.kernels.errors import KernelInputError


def refused(call):
    with pytest.raises(KernelInputError) as told:
        call()
    return told.value.op, told.value.argument


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_linear_takes_only_what_fits_the_weight(dtype):
    packed = ops.pack_weight(torch.randn(4, 8).to(dtype))
    other = torch.float16 if dtype is torch.float32 else torch.float32
    for x in (
        torch.randn(2, 7).to(dtype),
        torch.randn(8).to(dtype),
        torch.randn(1, 2, 8).to(dtype),
        torch.randn(2, 8).to(other),
    ):
        assert refused(lambda x=x: ops.linear(x, packed)) == ("linear", "x")
    assert refused(lambda: ops.linear(torch.randn(2, 8, dtype=dtype, device="meta"), packed)) == ("linear", "x")


def test_pack_weight_takes_matrices_of_floats():
    assert refused(lambda: ops.pack_weight(torch.randn(4))) == ("pack_weight", "weight")
    assert refused(lambda: ops.pack_weight(torch.ones(4, 4, dtype=torch.int8))) == ("pack_weight", "weight")
    assert refused(lambda: ops.pack_weight(torch.randn(4, 8), torch.randn(8))) == ("pack_weight", "bias")
    assert refused(lambda: ops.pack_weight(torch.randn(4, 8), torch.ones(4, dtype=torch.int64))) == (
        "pack_weight",
        "bias",
    )


def test_strides_and_numbers():
    expect.dense_rows("op", "x", torch.randn(3, 1).t())
    assert refused(lambda: expect.dense_rows("op", "x", torch.randn(3, 2).t())) == ("op", "x")
    expect.at_least("op", "n", 1, 1)
    assert refused(lambda: expect.at_least("op", "n", 0, 1)) == ("op", "n")
