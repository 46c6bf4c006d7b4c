"""Each way to cheat is a candidate that must be refused; honest candidates pass a hundred times."""

import pytest
import torch
from kernel_bench.correctness import (
    Bound,
    RefusedError,
    attention_bound,
    check,
    exact_attention,
    gemm_bound,
    is_downgraded,
)


class LazyTensor(torch.Tensor):
    """Computes when somebody looks: after the clock has stopped."""


def product(dtype, seed=0, inputs=64):
    generator = torch.Generator().manual_seed(seed)
    x, w = (torch.randn(shape, generator=generator).to(dtype) for shape in ((16, inputs), (24, inputs)))
    bound = gemm_bound(inputs, float(x.abs().max()), float(w.abs().max()), dtype)
    return x, w, x.double() @ w.double().t(), bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_honest_products_pass(dtype):
    for seed in range(100):
        x, w, truth, bound = product(dtype, seed)
        assert check((x.float() @ w.float().t()).to(dtype), truth, bound, dtype) <= 1


CHEATS = {
    "lazily typed": lambda y: y.as_subclass(LazyTensor),
    "all zeros": torch.zeros_like,
    "NaN": lambda y: y.index_fill(0, torch.tensor([3]), float("nan")),
    "infinity": lambda y: y.index_fill(0, torch.tensor([3]), float("inf")),
    "another shape": lambda y: y[:, :-1],
    "another dtype": lambda y: y.float(),
    "one wrong number": lambda y: y.index_put((torch.tensor(2), torch.tensor(5)), torch.tensor(99.0).bfloat16()),
    "fewer bits": lambda y: y.to(torch.float8_e5m2).to(y.dtype),
    "another input's result": lambda y: y.roll(1, 0),
    "not a tensor": lambda y: y.tolist(),
}


@pytest.mark.parametrize("name", CHEATS)
def test_cheats_are_refused(name):
    x, w, truth, bound = product(torch.bfloat16)
    honest = (x.float() @ w.float().t()).bfloat16()
    check(honest, truth, bound, torch.bfloat16)
    with pytest.raises(RefusedError):
        check(CHEATS[name](honest), truth, bound, torch.bfloat16)


def test_a_float32_product_in_bfloat16_is_refused_by_value_and_by_its_bits():
    x, w, truth, bound = product(torch.float32)
    coarse = (x.bfloat16() @ w.bfloat16().t()).float()
    assert is_downgraded(coarse)
    with pytest.raises(RefusedError, match="fewer bits"):
        check(coarse, truth, bound, torch.float32)
    # with noise in the low bits the value gives it away
    with pytest.raises(RefusedError, match="beyond the bound"):
        check(coarse * (1 + 1e-7), truth, bound, torch.float32)


def test_cancellation_shows_a_downgrade():
    """Ill-conditioned: the sum is small beside its terms, as with a 10-bit mantissa in a matrix unit."""
    x = torch.tensor([[4097.0, 1.0, -4096.0] * 32])
    w = 1 + torch.rand(70, 1, generator=torch.Generator().manual_seed(0)).expand(70, 96) / 8
    truth = x.double() @ w.double().t()
    bound = gemm_bound(96, 4097.0, 1.14, torch.float32)
    check((x.double() @ w.double().t()).float(), truth, bound, torch.float32)
    with pytest.raises(RefusedError):
        check((x.half().float() @ w.t()) * (1 + 1e-7), truth, bound, torch.float32)


def test_nan_and_infinity_where_the_truth_has_them_are_right():
    truth = torch.tensor([1.0, float("nan"), float("-inf")], dtype=torch.float64)
    assert check(truth.float(), truth, Bound(1e-6, 0.0), torch.float32) == 0
    with pytest.raises(RefusedError, match="infinities"):
        check(torch.tensor([1.0, float("nan"), 5.0]), truth, Bound(1e-6, 0.0), torch.float32)


def test_zeros_are_right_where_the_truth_is_zero_and_integers_are_compared_exactly():
    assert check(torch.zeros(4), torch.zeros(4), Bound(0.0, 0.0), torch.float32) == 0
    words = torch.tensor([2**32 - 1, 5])
    assert check(words, words, Bound(0.0, 0.0), torch.int64) == 0
    with pytest.raises(RefusedError):
        check(words + 1, words, Bound(0.0, 0.0), torch.int64)


def test_a_share_of_elements_may_be_off_but_not_far():
    truth = torch.ones(100, dtype=torch.float64)
    found = torch.ones(100)
    found[0] = 1.2
    with pytest.raises(RefusedError):
        check(found, truth, Bound(0.1, 0.0), torch.float32)
    assert check(found, truth, Bound(0.1, 0.0, share=0.95, cap=3), torch.float32) == pytest.approx(2, rel=1e-6)
    found[0] = 1.5
    with pytest.raises(RefusedError):
        check(found, truth, Bound(0.1, 0.0, share=0.95, cap=3), torch.float32)


def test_exact_attention_is_softmax_of_scores():
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 8), torch.randn(5, 2, 8), torch.randn(5, 2, 8)
    found = exact_attention(q, k, v, torch.tensor([2, 4]), 0.5)
    expected = torch.nn.functional.scaled_dot_product_attention(
        q[:1].transpose(0, 1).double(),
        *(each[:3].transpose(0, 1).repeat_interleave(2, 0).double() for each in (k, v)),
        scale=0.5,
    )
    torch.testing.assert_close(found[0], expected[:, 0])
    assert attention_bound(2.0, torch.bfloat16) == Bound(3 * 2.0**-8, 0.0)
