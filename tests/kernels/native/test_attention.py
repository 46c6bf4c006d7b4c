"""C++ paged attention against the float64 reference, for every instruction set here."""

import numpy as np
import pytest
import torch
from fakes.in_ci import every
from fakes.paged_case import PagedCase
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from penstock.kernels.errors import KernelInputError
from penstock.kernels.native import attention as native
from penstock.kernels.native import kv_blocks as native_kv_blocks
from penstock.kernels.ragged import AttentionPlan, RaggedBatch
from penstock.kernels.reference import attention as reference

BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 1.5 * 2**-8}
# Chunks of 64 keys, tiles of 96 lines: below, at and beyond both.
ROWS = [(0, 1), (63, 1), (64, 1), (200, 1), (0, 40), (5, 2), (61, 70), (128, 33), (0, 130)]


def attend(case, **limits):
    return native.paged_attention(case.q, case.kv, 0, native.plan_attention(case.kv, case.batch), 0.125, **limits)


def truth(case, **limits):
    plan = AttentionPlan(case.batch)
    return reference.paged_attention(case.q.double(), case.kv.double(), 0, plan, 0.125, **limits)


@pytest.mark.parametrize("limits", [{}, {"window": 1}, {"window": 9}, {"window": 100}, {"soft_cap": 20.0}], ids=str)
@pytest.mark.parametrize(
    ("heads", "group", "dim"), every(2, [(2, 1, 64), (1, 3, 48), (2, 4, 80), (1, 16, 32), (1, 2, 256)])
)
@pytest.mark.parametrize("dtype", BOUNDS)
def test_against_float64(level, heads, group, dim, dtype, limits):
    case = PagedCase(ROWS, heads=heads, group=group, dim=dim, dtype=dtype)
    error = (attend(case, **limits).double() - truth(case, **limits)).abs().max()
    assert error <= BOUNDS[dtype] * case.kv.double().abs().max()


@given(
    st.lists(st.tuples(st.integers(0, 150), st.integers(1, 20)), min_size=1, max_size=8),
    st.sampled_from([(1, 1), (2, 5), (1, 7), (3, 2)]),
    st.sampled_from([16, 24, 64, 96]),
    st.sampled_from([0, 1, 5, 64, 70]),
    st.integers(0, 99),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_ragged_batch(level, rows, heads, dim, window, seed):
    case = PagedCase(rows, heads=heads[0], group=heads[1], dim=dim, seed=seed)
    torch.testing.assert_close(attend(case, window=window).double(), truth(case, window=window), atol=1e-5, rtol=1e-5)


def test_the_rest_of_the_batch_and_the_chunking_change_nothing(level):
    """Bitwise: one row alone, in company, and its prompt in two chunks."""
    rows = [(0, 100), (30, 1), (0, 7)]
    case = PagedCase(rows, heads=2, group=3, dim=64, dtype=torch.bfloat16)
    together = attend(case)
    alone = RaggedBatch(case.batch.starts[:1], case.batch.offsets[:2], case.batch.block_tables[:1])
    later = RaggedBatch(np.array([60], np.int32), np.array([0, 40], np.int32), case.batch.block_tables[:1])
    for batch, tokens in ((alone, slice(0, 100)), (later, slice(60, 100))):
        plan = native.plan_attention(case.kv, batch)
        assert torch.equal(native.paged_attention(case.q[tokens], case.kv, 0, plan, 0.125), together[tokens])


def test_log_sum_exp(level):
    case = PagedCase(ROWS, heads=2, group=2, dim=64)
    plan = native.plan_attention(case.kv, case.batch)
    out, lse = native.paged_attention_with_lse(case.q, case.kv, 0, plan, 0.125, window=50)
    wanted = reference.paged_attention_with_lse(
        case.q.double(), case.kv.double(), 0, AttentionPlan(case.batch), 0.125, window=50
    )
    torch.testing.assert_close(out.double(), wanted[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse.double(), wanted[1].double(), atol=1e-4, rtol=0)


def test_a_nan_stays_with_its_own_token(level):
    case = PagedCase([(3, 1), (9, 1), (0, 5)], heads=1, group=2, dim=64)
    clean = attend(case)
    case.q[0, 1, 7] = torch.nan
    out = attend(case)
    assert torch.isnan(out[0, 1]).all()
    assert torch.equal(out[1:], clean[1:])


def test_queries_that_are_a_view(level):
    case = PagedCase([(9, 1), (0, 30)], heads=2, group=2, dim=32)
    wide = torch.cat((case.q, torch.full_like(case.q, torch.nan)), dim=1)
    plan = native.plan_attention(case.kv, case.batch)
    view = native.paged_attention(wide[:, : case.q.shape[1]], case.kv, 0, plan, 0.125)
    assert torch.equal(view, attend(case))


def test_write_kv_by_places(level):
    case = PagedCase([(5, 3), (0, 9), (16, 1)], heads=2, group=1, dim=32)
    new = torch.randn(case.batch.num_tokens, 2, 2, 32)
    new[0, 0, 0, 0], new[1, 1, 1, 1] = torch.nan, torch.inf
    ours, theirs = case.kv.clone(), case.kv.clone()
    native_kv_blocks.write_kv(ours, 0, new, native.plan_attention(case.kv, case.batch))
    from penstock.kernels.reference import kv_blocks as reference_kv_blocks

    reference_kv_blocks.write_kv(theirs, 0, new, AttentionPlan(case.batch))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("number", [-1, 10_000])
def test_a_block_that_does_not_exist_is_refused(number):
    case = PagedCase([(9, 1), (0, 30)])
    tables = case.batch.block_tables.copy()
    tables[1, 2] = number
    with pytest.raises(KernelInputError, match="block_tables"):
        native.plan_attention(case.kv, RaggedBatch(case.batch.starts, case.batch.offsets, tables))


def test_other_backends_plans_and_wrong_sizes_are_refused():
    case = PagedCase([(9, 1), (0, 30)])
    with pytest.raises(KernelInputError, match="another backend"):
        native.paged_attention(case.q, case.kv, 0, AttentionPlan(case.batch), 0.125)
    plan = native.plan_attention(case.kv, case.batch)
    with pytest.raises(KernelInputError, match="tokens"):
        native.paged_attention(case.q[1:], case.kv, 0, plan, 0.125)
    with pytest.raises(KernelInputError, match="contiguous"):
        native.paged_attention(case.q, case.kv.transpose(3, 4), 0, plan, 0.125)


def test_an_empty_batch(level):
    case = PagedCase([(0, 1)])
    empty = RaggedBatch(np.empty(0, np.int32), np.zeros(1, np.int32), np.empty((0, 1), np.int32))
    plan = native.plan_attention(case.kv, empty)
    assert native.paged_attention(case.q[:0], case.kv, 0, plan, 0.125).shape == (0, *case.q.shape[1:])
