"""The corrected interpreter gives a GPU's results: bfloat16 rounded and multiplied, loops over run-time bounds."""

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from penstock.kernels.gpu import interpreting

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@triton.jit
def round_kernel(x, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i).to(tl.bfloat16))


@triton.jit
def product_kernel(x, y, out, BLOCK: tl.constexpr):
    i, j = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    tl.store(out + i * BLOCK + j, tl.dot(tl.load(x + i * BLOCK + j), tl.load(y + i * BLOCK + j)))


@triton.jit
def count_kernel(out, bound):
    total = 0
    for i in range(bound - 1, bound + 2):
        total += i
    tl.store(out, total)


def test_float32_becomes_the_nearest_bfloat16():
    torch.manual_seed(0)
    x = torch.cat(
        [torch.randn(1000) * 10.0 ** torch.randint(-38, 38, (1000,)), torch.tensor([1 + 2**-8, 1 + 3 * 2**-8])]
    )
    x = torch.cat([x, torch.tensor([0.0, -0.0, float("inf"), float("nan"), 3.4e38, 2.0**-140]), torch.zeros(16)]).to(
        DEVICE
    )
    out = torch.empty(1024, dtype=torch.bfloat16, device=DEVICE)
    round_kernel[(1,)](x, out, 1024)
    assert torch.equal(out.nan_to_num(7.0), x.bfloat16().nan_to_num(7.0))


def test_bfloat16_products():
    torch.manual_seed(0)
    x, y = torch.randn(2, 16, 16, device=DEVICE).bfloat16().unbind()
    out = torch.empty(16, 16, device=DEVICE)
    product_kernel[(1,)](x.contiguous(), y.contiguous(), out, 16)
    assert torch.allclose(out, x.float() @ y.float(), atol=1e-5)


def test_loops_over_bounds_of_run_time():
    out = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    count_kernel[(1,)](out, 5)
    assert out.item() == 4 + 5 + 6


def test_correcting_twice_is_harmless():
    interpreting.correct_interpreter()
    test_bfloat16_products()
