"""Paged attention: the CPU kernel against the float64 reference, and the reference against a dense formula."""

import math

import numpy as np
import pytest
import torch
from fakes.paged_case import PagedCase
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.kernels import ops
from penstock.kernels.cpu import attention as cpu
from penstock.kernels.cpu import grouping
from penstock.kernels.reference import attention as reference

MIXES = {
    "decodes": [(0, 1), (3, 1), (4, 1), (15, 1), (200, 1)],
    "fresh prompts": [(0, 2), (0, 5), (0, 4), (0, 100), (0, 97)],
    "later chunks": [(4, 3), (8, 16), (5, 2), (64, 40), (61, 33)],
    "everything": [(9, 1), (0, 7), (30, 1), (6, 6), (0, 1), (0, 12), (7, 2), (2, 1)],
    "one token": [(0, 1)],
}


# Slots are 4: a window inside one block, up to a border, over it, and longer than some or all contexts.
WINDOWS = [1, 3, 4, 5, 16, 30, 1000]


def truth(case, layer, scale, **limits):
    plan = reference.plan_attention(case.kv, case.batch)
    return reference.paged_attention(case.q.double(), case.kv.double(), layer, plan, scale, **limits)


def by_hand(case, layer, scale, window=0, soft_cap=0.0):
    """Token by token and head by head, from the formula alone."""
    slots, heads = case.kv.shape[4], case.kv.shape[3]
    out = torch.empty(case.q.shape, dtype=torch.float64)
    for row, (start, count) in enumerate(zip(case.batch.starts, case.batch.counts, strict=True)):
        for new in range(count):
            token, position = int(case.batch.offsets[row]) + new, int(start) + new
            seen = range(max(0, position - window + 1) if window else 0, position + 1)
            stored = torch.stack([case.kv[case.tables[row, p // slots], layer, :, :, p % slots] for p in seen]).double()
            for head in range(case.q.shape[1]):
                keys, values = stored[:, :, head * heads // case.q.shape[1]].unbind(1)
                scores = scale * keys @ case.q[token, head].double()
                scores = soft_cap * torch.tanh(scores / soft_cap) if soft_cap else scores
                out[token, head] = torch.softmax(scores, -1) @ values
    return out


def bound(dtype):
    return {torch.float32: 1e-5, torch.bfloat16: 1.5 * 2**-8, torch.float16: 1.5 * 2**-11}[dtype]


@pytest.mark.parametrize("rows", MIXES.values(), ids=MIXES.keys())
@pytest.mark.parametrize(("heads", "group", "dim"), [(2, 3, 48), (5, 1, 64), (1, 4, 80), (1, 8, 128)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cpu_against_float64(rows, heads, group, dim, dtype):
    case = PagedCase(rows, heads=heads, group=group, dim=dim, dtype=dtype)
    out = ops.paged_attention(case.q, case.kv, 1, ops.plan_attention(case.kv, case.batch), 1 / math.sqrt(dim))
    error = (out.double() - truth(case, 1, 1 / math.sqrt(dim))).abs().max()
    # One rounding of the result comes on top of the bound for the weights.
    assert error <= (bound(dtype) + torch.finfo(dtype).eps) * case.kv.abs().max()


@pytest.mark.parametrize("gather_bytes", [1, 4096, grouping.GATHER_BYTES])
def test_the_size_of_groups_does_not_matter(monkeypatch, gather_bytes):
    monkeypatch.setattr(grouping, "GATHER_BYTES", gather_bytes)
    case = PagedCase([(k % 9, 1 + (k % 5) * (k % 2)) for k in range(20)])
    out = cpu.paged_attention(case.q, case.kv, 0, cpu.plan_attention(case.kv, case.batch), 0.3)
    torch.testing.assert_close(out.double(), truth(case, 0, 0.3), atol=1e-5, rtol=1e-5)


@given(
    rows=st.lists(st.tuples(st.integers(0, 40), st.integers(1, 20)), min_size=1, max_size=12), seed=st.integers(0, 99)
)
@settings(max_examples=60, deadline=None)
def test_any_ragged_batch(rows, seed):
    case = PagedCase(rows, seed=seed)
    out = cpu.paged_attention(case.q, case.kv, 0, cpu.plan_attention(case.kv, case.batch), 0.25)
    torch.testing.assert_close(out.double(), truth(case, 0, 0.25), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("soft_cap", [0.0, 1.5])
@pytest.mark.parametrize("window", WINDOWS)
def test_windows_and_caps_by_hand(window, soft_cap):
    case = PagedCase([(9, 1), (0, 7), (30, 1), (6, 6), (0, 1), (0, 12), (15, 2), (3, 20)])
    expected = by_hand(case, 1, 0.5, window, soft_cap)
    limits = {"window": window, "soft_cap": soft_cap}
    torch.testing.assert_close(truth(case, 1, 0.5, **limits), expected)
    plan = ops.plan_attention(case.kv, case.batch)
    for layer in (0, 1):  # the second finds the plan of the first
        out = ops.paged_attention(case.q, case.kv, layer, plan, 0.5, **limits)
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rows", MIXES.values(), ids=MIXES.keys())
@pytest.mark.parametrize(("heads", "group", "dim"), [(2, 3, 48), (1, 4, 256)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("window", "soft_cap"), [(10, 0.0), (0, 2.0), (10, 2.0)])
def test_limited_cpu_against_float64(rows, heads, group, dim, dtype, window, soft_cap):
    case = PagedCase(rows, heads=heads, group=group, dim=dim, dtype=dtype)
    limits = {"window": window, "soft_cap": soft_cap}
    plan = ops.plan_attention(case.kv, case.batch)
    out = ops.paged_attention(case.q, case.kv, 1, plan, 1 / math.sqrt(dim), **limits)
    error = (out.double() - truth(case, 1, 1 / math.sqrt(dim), **limits)).abs().max()
    assert error <= (bound(dtype) + torch.finfo(dtype).eps) * case.kv.abs().max()


@pytest.mark.parametrize(("window", "soft_cap"), [(7, 0.0), (500, 0.0), (0, 2.0), (300, 2.0)])
def test_long_rows_are_cut_into_pieces_and_tiles(monkeypatch, window, soft_cap):
    monkeypatch.setattr(cpu, "SCORE_ELEMENTS", 100_000)
    case = PagedCase([(0, 700), (400, 301), (800, 1), (0, 2)], heads=1, group=2, slots=16)
    limits = {"window": window, "soft_cap": soft_cap}
    out = cpu.paged_attention(case.q, case.kv, 0, cpu.plan_attention(case.kv, case.batch), 0.25, **limits)
    torch.testing.assert_close(out.double(), truth(case, 0, 0.25, **limits), atol=1e-5, rtol=1e-5)


@given(
    rows=st.lists(st.tuples(st.integers(0, 40), st.integers(1, 20)), min_size=1, max_size=12),
    window=st.integers(1, 64),
    soft_cap=st.sampled_from([0.0, 1.0]),
    seed=st.integers(0, 99),
)
@settings(max_examples=25, deadline=None)
def test_any_ragged_batch_with_any_window(rows, window, soft_cap, seed):
    case, limits = PagedCase(rows, seed=seed), {"window": window, "soft_cap": soft_cap}
    out = cpu.paged_attention(case.q, case.kv, 0, cpu.plan_attention(case.kv, case.batch), 0.25, **limits)
    torch.testing.assert_close(out.double(), truth(case, 0, 0.25, **limits), atol=1e-5, rtol=1e-5)


def test_one_plan_serves_layers_of_different_windows():
    case = PagedCase([(30, 1), (9, 12), (0, 25)])
    plan = cpu.plan_attention(case.kv, case.batch)
    for window in (8, 0, 20, 8):
        out = cpu.paged_attention(case.q, case.kv, 0, plan, 0.25, window=window)
        torch.testing.assert_close(out.double(), truth(case, 0, 0.25, window=window), atol=1e-5, rtol=1e-5)
    assert set(plan.groups) == {8, 0, 20}


def test_blocks_outside_every_window_are_not_read():
    case = PagedCase([(30, 1), (17, 5), (41, 1)])
    plan = cpu.plan_attention(case.kv, case.batch)
    before = cpu.paged_attention(case.q, case.kv, 0, plan, 0.25, window=6)
    for row, start in enumerate(case.batch.starts):
        case.kv[torch.from_numpy(case.tables[row, : (start - 5) // 4]).long()] = float("nan")
    assert torch.equal(cpu.paged_attention(case.q, case.kv, 0, plan, 0.25, window=6), before)
    assert cpu.paged_attention(case.q, case.kv, 0, plan, 0.25).isnan().any()


def test_reference_against_a_dense_formula():
    case = PagedCase([(5, 3)], heads=2, group=2, dim=8)
    positions = np.arange(8)
    stored = case.kv[case.tables[0, positions // 4], 0, :, :, positions % 4].double()  # [S, 2, H, D]
    out = truth(case, 0, 0.5)
    for token in range(3):
        for head in range(4):
            keys, values = stored[: 6 + token, 0, head // 2], stored[: 6 + token, 1, head // 2]
            weights = torch.softmax(0.5 * keys @ case.q[token, head].double(), -1)
            torch.testing.assert_close(out[token, head], weights @ values)


def test_foreign_blocks_and_stale_slots_do_not_reach_the_result():
    case = PagedCase([(5, 1), (17, 1), (0, 3), (2, 5)])
    plan = cpu.plan_attention(case.kv, case.batch)
    before = cpu.paged_attention(case.q, case.kv, 0, plan, 0.25)
    case.kv[torch.from_numpy(case.unused).long()] = float("nan")
    for row, (start, count) in enumerate(zip(case.batch.starts, case.batch.counts, strict=True)):
        length = int(start + count)
        if length % 4:
            case.kv[case.tables[row, length // 4], :, :, :, length % 4 :] = 1e30
    assert torch.equal(cpu.paged_attention(case.q, case.kv, 0, plan, 0.25), before)


def test_every_block_of_the_context_matters():
    case = PagedCase([(14, 1), (9, 4)])
    plan = cpu.plan_attention(case.kv, case.batch)
    before = cpu.paged_attention(case.q, case.kv, 0, plan, 0.25)
    for row, tokens in ((0, slice(0, 1)), (1, slice(1, 5))):
        for block in case.tables[row, :3]:
            kept = case.kv[block].clone()
            case.kv[block] += 1
            assert not torch.equal(cpu.paged_attention(case.q, case.kv, 0, plan, 0.25)[tokens], before[tokens])
            case.kv[block] = kept
