"""Log-sum-exp, merges and 8-bit codes on the CPU, against the float64 reference and the reference against formulas."""

import numpy as np
import pytest
import torch
from fakes.paged_case import PagedCase
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.kernels import ops, quantized_kv
from penstock.kernels.cpu import attention_states as cpu
from penstock.kernels.reference import attention as reference

ROWS = [(9, 1), (0, 7), (30, 1), (6, 6), (0, 1)]
CODES = [torch.float8_e4m3fn, torch.int8]


def truth(case, layer, scale, **limits):
    kv = case.kv if quantized_kv.is_quantized(case.kv) else case.kv.double()
    plan = reference.plan_attention(case.kv, case.batch)
    return reference.paged_attention_with_lse(case.q.double(), kv, layer, plan, scale, **limits)


@pytest.mark.parametrize("limits", [{}, {"window": 5}, {"soft_cap": 1.5}, {"window": 12, "soft_cap": 3.0}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_attention_with_its_log_sum_exp(monkeypatch, limits, dtype):
    monkeypatch.setattr(cpu, "SCORE_ELEMENTS", 200)  # some rows take several tiles
    case = PagedCase(ROWS, heads=2, group=3, dim=20, dtype=dtype)
    out, lse = ops.paged_attention_with_lse(case.q, case.kv, 1, ops.plan_attention(case.kv, case.batch), 0.3, **limits)
    expected = truth(case, 1, 0.3, **limits)
    bound = {torch.float32: 1e-5, torch.bfloat16: 1.5 * 2**-8, torch.float16: 1.5 * 2**-11}[dtype]
    assert (out.double() - expected[0]).abs().max() <= (bound + torch.finfo(dtype).eps) * case.kv.abs().max()
    assert (lse.double() - expected[1]).abs().max() <= 1e-4


def test_the_reference_by_hand():
    case = PagedCase([(5, 1)], heads=1, group=1, dim=8)
    keys, values = (
        torch.stack([case.kv[case.tables[0, p // 4], 0, part, 0, p % 4] for p in range(6)]).double() for part in (0, 1)
    )
    scores = 0.5 * keys @ case.q[0, 0].double()
    out, lse = truth(case, 0, 0.5)
    torch.testing.assert_close(lse[0, 0], scores.exp().sum().log())
    torch.testing.assert_close(out[0, 0], (scores - lse[0, 0]).exp() @ values)


@pytest.mark.parametrize("stored", CODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_write_and_read_codes(stored, dtype):
    """What is read back is within half a step of what was written (K and V of every head by its own scale)."""
    case = PagedCase(ROWS, heads=2, group=2, dim=32, dtype=dtype)
    case.kv = torch.zeros(case.kv.shape, dtype=torch.uint8).view(stored)
    scales = (0.5 + torch.rand(2, 2, 2)) * case.new.float().abs().max() / quantized_kv.MOST[stored]
    plan = ops.plan_attention(case.kv, case.batch)
    ops.write_kv(case.kv, 1, case.new, plan, scales)
    for row, (start, count) in enumerate(ROWS):
        for new in range(count):
            p, t = start + new, int(case.batch.offsets[row]) + new
            codes = quantized_kv.decode(
                quantized_kv.bits(case.kv)[case.tables[row, p // 4], 1, :, :, p % 4], torch.float32, case.kv
            )
            number, limit = case.new[t].float(), quantized_kv.MOST[stored] * scales[1, :, :, None]
            number = number.clamp(-limit, limit)
            step = (
                0.5 * scales[1, :, :, None]
                if stored == torch.int8
                else number.abs() / 16 + scales[1, :, :, None] / 1024
            )
            assert ((codes * scales[1, :, :, None] - number).abs() <= step * 1.0001).all()
    out = ops.paged_attention(case.q, case.kv, 1, plan, 0.3, kv_scales=scales)
    expected = truth(case, 1, 0.3, kv_scales=scales)[0]
    bound = {torch.float32: 1e-5, torch.bfloat16: 2.5 * 2**-8}[dtype] * case.new.float().abs().max()
    assert (out.double() - expected).abs().max() <= bound


@pytest.mark.parametrize("stored", CODES)
def test_codes_of_numbers_that_do_not_fit(stored):
    most = quantized_kv.MOST[stored]
    numbers = torch.tensor([float("nan"), float("inf"), float("-inf"), 1e9, 0.0]).view(1, 1, 1, 5)
    codes = quantized_kv.encode(numbers, torch.ones(1, 1), stored).float().flatten().tolist()
    assert codes == [0, most, -most, most, 0]


def test_blocks_of_codes_are_moved_as_bits():
    kv = torch.randint(0, 256, (6, 2, 2, 3, 4, 8), dtype=torch.uint8)
    codes, blocks = kv.view(torch.float8_e4m3fn), torch.tensor([4, 1])
    for backend in (ops, reference_blocks()):
        staging = torch.zeros(2, 2, 2, 2, 4, 8, dtype=torch.uint8).view(torch.float8_e4m3fn)
        backend.gather_blocks(codes, blocks, staging, 1)
        assert torch.equal(staging.view(torch.uint8), kv[blocks, :, :, 1:])
        target = torch.zeros_like(kv)
        backend.scatter_blocks(target.view(torch.float8_e4m3fn), blocks, staging, 1)
        assert torch.equal(target[blocks, :, :, 1:], kv[blocks, :, :, 1:])
        assert int(target.count_nonzero()) == int(kv[blocks, :, :, 1:].count_nonzero())
        backend.copy_blocks(codes, torch.tensor([[0, 5]]))
        assert torch.equal(kv[5], kv[0])


def reference_blocks():
    from penstock.kernels.reference import kv_blocks

    return kv_blocks


@given(
    sizes=st.lists(st.integers(0, 5), min_size=1, max_size=6),
    heads=st.integers(1, 3),
    first=st.integers(0, 2),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_merges(sizes, heads, first, seed):
    torch.manual_seed(seed)
    indptr = torch.tensor(first + np.cumsum([0, *sizes]))
    o, lse = torch.randn(int(indptr[-1]) + 1, heads, 8), 30 * torch.randn(int(indptr[-1]) + 1, heads)
    lse[torch.rand(lse.shape) < 0.3] = float("-inf")
    o[lse == float("-inf")] = float("nan")
    out, state = ops.merge_states(o, lse, indptr)
    exact = reference.merge_states(o.double(), lse.double(), indptr)
    torch.testing.assert_close(out.double(), exact[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(state.double(), exact[1], atol=1e-5, rtol=1e-5)
    for merge, size in enumerate(sizes):
        if size == 0:
            assert (out[merge] == 0).all()
            assert (state[merge] == float("-inf")).all()
