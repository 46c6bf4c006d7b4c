"""Paged attention in Triton's interpreter (or on a GPU): against float64, and against itself cut otherwise."""

import math
from itertools import product

import numpy as np
import pytest
import torch
from fakes.in_ci import every
from fakes.paged_case import PagedCase
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from penstock.kernels.gpu import attention as gpu
from penstock.kernels.gpu.attention_plan import PlanSettings
from penstock.kernels.gpu.attention_workspace import GpuPlan, prepare
from penstock.kernels.ragged import RaggedBatch
from penstock.kernels.reference import attention as reference
from penstock.kernels.shared_prefix import SharingRule

MIXES = {
    "decodes": [(0, 1), (3, 1), (4, 1), (15, 1), (90, 1)],
    "fresh prompts": [(0, 2), (0, 5), (0, 4), (0, 40)],
    "later chunks": [(4, 3), (8, 16), (5, 2), (33, 20)],
    "everything": [(9, 1), (0, 7), (30, 1), (6, 6), (0, 1), (0, 12), (2, 1)],
}
# Toy chunks, so that short rows are split as long ones are on a card.
FREE = {"decode_overhead": 0, "tile_overhead": 0, "merge_cost": 0}
SPLIT = PlanSettings(sm_count=64, min_chunk=16, sharing=None, **FREE)
UNSPLIT = PlanSettings(sm_count=1, min_chunk=1 << 20, sharing=None)
FIXED = PlanSettings(fixed_split=16, query_tile=64, sharing=None)


def truth(case, layer, scale, q=None, **limits):
    kv = case.kv.double() if case.kv.is_floating_point() and case.kv.element_size() > 1 else case.kv
    plan = reference.plan_attention(case.kv, case.batch)
    return reference.paged_attention_with_lse((case.q if q is None else q).double(), kv, layer, plan, scale, **limits)


def run(case, layer, scale, how=SPLIT, **limits):
    heads = case.q.shape[1]
    plan = GpuPlan(case.batch, how, {heads: prepare(case.kv, heads, case.batch, how)}, [])
    return gpu.paged_attention_with_lse(case.q, case.kv, layer, plan, scale, **limits)


def check(case, out, lse, expected, magnitude=None):
    dtype = case.q.dtype
    bound = {torch.float32: 1e-5, torch.bfloat16: 1.5 * 2**-8, torch.float16: 1.5 * 2**-11}[dtype]
    # One rounding of the result comes on top of the bound for the weights.
    magnitude = case.kv.abs().max().double() if magnitude is None else magnitude
    assert out.dtype == dtype
    assert (out.double() - expected[0]).abs().max() <= (bound + torch.finfo(dtype).eps) * magnitude
    assert (lse.double() - expected[1]).abs().max() <= 1e-4


SHAPES = [(2, 3, 48, 4), (1, 4, 80, 16), (3, 1, 64, 8)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CHOSEN = list(zip(SHAPES, DTYPES, strict=True))[:2]
OTHERS = [(shape, dtype) for shape in SHAPES for dtype in DTYPES if (shape, dtype) not in CHOSEN]


@pytest.mark.parametrize("rows", MIXES.values(), ids=MIXES.keys())
@pytest.mark.parametrize(
    ("shape", "dtype"), [*CHOSEN, *(pytest.param(*other, marks=pytest.mark.slow) for other in OTHERS)]
)
def test_against_float64(rows, shape, dtype):
    heads, group, dim, slots = shape
    case = PagedCase(rows, heads=heads, group=group, dim=dim, slots=slots, dtype=dtype)
    check(case, *run(case, 1, 1 / math.sqrt(dim)), truth(case, 1, 1 / math.sqrt(dim)))


@pytest.mark.parametrize(
    ("heads", "group", "dim", "slots"),
    [(1, 1, 16, 64), (2, 7, 96, 32), (1, 8, 128, 16), (1, 16, 24, 4), (1, 20, 40, 8), (1, 2, 256, 16), (1, 5, 72, 16)],
)
def test_groups_dims_and_pages(heads, group, dim, slots):
    case = PagedCase([(70, 1), (3, 5), (0, 1), (11, 1)], heads=heads, group=group, dim=dim, slots=slots)
    check(case, *run(case, 1, 0.2), truth(case, 1, 0.2))


@pytest.mark.parametrize(
    ("how", "window", "soft_cap"),
    every(
        2,
        [
            *((SPLIT, window, 0.0) for window in (1, 5, 16, 1000)),
            *((UNSPLIT, window, 0.0) for window in (1, 30)),
            (SPLIT, 5, 1.5),
            (UNSPLIT, 30, 1.5),
            (SPLIT, 0, 1.5),
        ],
    ),
)
def test_windows_and_caps(how, window, soft_cap):
    case = PagedCase([(9, 1), (0, 7), (50, 1), (6, 6), (0, 12), (15, 2), (3, 20)], heads=1)
    limits = {"window": window, "soft_cap": soft_cap}
    check(case, *run(case, 1, 0.5, how, **limits), truth(case, 1, 0.5, **limits))


@pytest.mark.parametrize("soft_cap", [0.05, 1.5, 30.0, 1e4])
def test_caps_of_any_size(soft_cap):
    case = PagedCase([(20, 1), (0, 5)])
    check(case, *run(case, 0, 1.0, soft_cap=soft_cap), truth(case, 0, 1.0, soft_cap=soft_cap))


@given(
    rows=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 20)), min_size=1, max_size=5),
    heads=st.integers(1, 2),
    group=st.integers(1, 9),
    dim=st.sampled_from([16, 20, 33, 48]),
    window=st.sampled_from([0, 0, 6, 25]),
    soft_cap=st.sampled_from([0.0, 1.0]),
    how=st.sampled_from([SPLIT, UNSPLIT, FIXED, PlanSettings()]),
    seed=st.integers(0, 99),
)
@settings(max_examples=5, deadline=None)
def test_any_ragged_batch(rows, heads, group, dim, window, soft_cap, how, seed):
    case, limits = PagedCase([*rows, (2, 1)], heads=heads, group=group, dim=dim, seed=seed), {}
    limits = {"window": window, "soft_cap": soft_cap}
    check(case, *run(case, 1, 0.25, how, **limits), truth(case, 1, 0.25, **limits))


def test_rows_without_new_tokens_and_an_empty_batch():
    case = PagedCase([(5, 0), (7, 1), (0, 0), (3, 4)])
    check(case, *run(case, 0, 0.3), truth(case, 0, 0.3))
    case = PagedCase([(5, 0)])
    out, lse = run(case, 0, 0.3)
    assert out.shape == (0, 6, 16)
    assert lse.shape == (0, 6)


def test_blocks_named_more_than_once():
    case = PagedCase([(30, 1), (17, 5), (22, 1)])
    case.batch.block_tables[0, 2:5] = case.batch.block_tables[0, 1]
    case.batch.block_tables[2] = case.batch.block_tables[0]
    check(case, *run(case, 1, 0.3), truth(case, 1, 0.3))


def test_views_of_other_storages():
    case = PagedCase([(9, 1), (3, 9), (30, 1)], heads=2, group=3, dim=24)
    case.q = torch.randn(2, case.q.shape[1], case.q.shape[0] + 5, 40).permute(0, 2, 1, 3)[1, 3:-2, :, 8:32]
    blocks, layers, _, heads, slots, dim = case.kv.shape
    case.kv = torch.randn(blocks, 2, layers, 3, heads + 1, slots, dim + 8)[:, 1, :, :2, 1:, :, :dim]
    assert not case.kv.is_contiguous()
    check(case, *run(case, 1, 0.3), truth(case, 1, 0.3))


def test_blocks_further_apart_than_32_bits_count():
    case = PagedCase([(9, 1), (0, 3)], heads=1, group=2, dtype=torch.bfloat16)
    shape, apart = case.kv[:5].shape, (1 << 31) // 4 + 64
    flat = torch.empty(5 * apart, dtype=torch.bfloat16)  # untouched memory takes no room
    far = flat.as_strided(shape, (apart, *case.kv.stride()[1:]))
    far.copy_(case.kv[:5])
    case.kv = far
    case.batch = RaggedBatch(case.batch.starts, case.batch.offsets, case.tables % 5)
    assert int(case.batch.block_tables.max()) * apart > 1 << 31
    check(case, *run(case, 1, 0.3), truth(case, 1, 0.3))


def test_stale_slots_and_foreign_blocks_are_not_read():
    case = PagedCase([(5, 1), (17, 1), (0, 3), (2, 5)])
    before = run(case, 0, 0.25)[0]
    case.kv[torch.from_numpy(case.unused).long()] = float("nan")
    for row, (start, count) in enumerate(zip(case.batch.starts, case.batch.counts, strict=True)):
        if (start + count) % 4:
            case.kv[case.tables[row, (start + count) // 4], :, :, :, (start + count) % 4 :] = float("nan")
    case.tables[0, 2:] = 10**6  # past the row's end a table may hold anything
    assert torch.equal(run(case, 0, 0.25)[0], before)


def test_blocks_outside_every_window_are_not_read():
    case = PagedCase([(70, 1), (17, 5), (41, 1)])
    before = [run(case, 0, 0.25, how, window=6)[0] for how in (SPLIT, UNSPLIT)]
    for row, start in enumerate(case.batch.starts):
        case.kv[torch.from_numpy(case.tables[row, : (start - 5) // 4]).long()] = float("nan")
    after = [run(case, 0, 0.25, how, window=6)[0] for how in (SPLIT, UNSPLIT)]
    assert torch.equal(after[0], before[0])
    assert torch.equal(after[1], before[1])
    assert run(case, 0, 0.25)[0].isnan().any()


def test_nan_in_one_query_stays_there():
    case = PagedCase([(70, 1), (3, 9), (5, 1)])
    before, state = run(case, 0, 0.25)
    case.q[4, 2, 0] = float("nan")
    after, after_state = run(case, 0, 0.25)
    hit = torch.zeros(before.shape[:2], dtype=torch.bool)
    hit[4, 2] = True
    assert after[hit].isnan().all()
    assert after_state[hit].isnan().all()
    assert torch.equal(after[~hit], before[~hit])
    assert torch.equal(after_state[~hit], state[~hit])


def test_two_splits_agree():
    case = PagedCase([(90, 1), (40, 17), (61, 1), (0, 3)], dim=48)
    one, other = (run(case, 1, 0.2, how) for how in (SPLIT, UNSPLIT))
    assert [prepare(case.kv, 6, case.batch, how).num_merge for how in (SPLIT, UNSPLIT)] == [19, 0]
    torch.testing.assert_close(one[0], other[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(one[1], other[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("window", [0, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fixed_split_does_not_depend_on_the_batch(window, dtype):
    case = PagedCase([(50, 1), (20, 17), (31, 1), (0, 3)], heads=1, dim=48, dtype=dtype)
    together = run(case, 1, 0.2, FIXED, window=window)
    for row in range(4):
        tokens = slice(int(case.batch.offsets[row]), int(case.batch.offsets[row + 1]))
        alone = PagedCase([(0, 1)], heads=1, dim=48, dtype=dtype)
        alone.kv, alone.q = case.kv, case.q[tokens]
        alone.batch = RaggedBatch(
            case.batch.starts[row : row + 1], np.array([0, len(alone.q)], np.int32), case.tables[row : row + 1]
        )
        result = run(alone, 1, 0.2, FIXED, window=window)
        assert torch.equal(result[0], together[0][tokens])
        assert torch.equal(result[1], together[1][tokens])


def sharing_case(prefixes, rows, **shape):
    """`prefixes`: (rows, blocks) that take the first blocks of their first row's table."""
    case = PagedCase(rows, **shape)
    for members, blocks in prefixes:
        case.tables[list(members), :blocks] = case.tables[members[0], :blocks]
    return case


TREES = {
    "one level": [(range(5), 6)],
    "two levels": [(range(6), 3), (range(1, 5), 6)],
    "three levels": [(range(8), 2), (range(1, 7), 4), (range(2, 6), 6)],
    "two groups": [(range(4), 5), (range(4, 8), 3)],
    "nobody": [],
}


@pytest.mark.parametrize(("tree", "limits"), every(4, product(TREES, ({}, {"window": 9}, {"soft_cap": 2.0}))))
def test_shared_prefixes(tree, limits):
    rows = [(24 + row, 1) for row in range(6)] + [(29, 3), (25, 2), (10, 1), (0, 6)]
    case = sharing_case(TREES[tree], rows, heads=2, group=2)
    how = PlanSettings(sm_count=64, min_chunk=8, sharing=SharingRule(3, 8), **FREE)
    check(case, *run(case, 1, 0.3, how, **limits), truth(case, 1, 0.3, **limits))


def test_shared_blocks_are_read_once():
    rows = [(96 + row, 1) for row in range(8)]
    case = sharing_case([(range(8), 24)], rows, heads=1, group=2)
    heads, own = case.q.shape[1], sum(start + 1 - 96 for start, _ in rows)
    for sharing, expected in ((SharingRule(4, 64), 96 + own), (None, 8 * 96 + own)):
        how = PlanSettings(sm_count=64, min_chunk=32, sharing=sharing, **FREE)
        prepared = prepare(case.kv, heads, case.batch, how)
        assert prepared.kv_tokens_read == expected
        out = gpu.paged_attention(case.q, case.kv, 0, GpuPlan(case.batch, how, {heads: prepared}, []), 0.3)
        torch.testing.assert_close(out.double(), truth(case, 0, 0.3)[0], atol=1e-5, rtol=1e-5)


def test_one_plan_serves_all_layers_windows_and_head_counts():
    case = PagedCase([(30, 1), (9, 12), (0, 25)])
    plan = gpu.plan_attention(case.kv, case.batch)
    for layer, window in ((0, 8), (1, 0), (0, 20)):
        out = gpu.paged_attention(case.q, case.kv, layer, plan, 0.25, window=window)
        torch.testing.assert_close(out.double(), truth(case, layer, 0.25, window=window)[0], atol=1e-5, rtol=1e-5)
    few = case.q[:, :2].contiguous()
    out = gpu.paged_attention(few, case.kv, 0, plan, 0.25)
    torch.testing.assert_close(out.double(), truth(case, 0, 0.25, few)[0], atol=1e-5, rtol=1e-5)
    assert set(plan.prepared) == {2, 6}


@pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.int8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_codes_against_float64_of_the_same_codes(stored, dtype):
    case = PagedCase(MIXES["everything"], heads=2, group=3, dim=48, dtype=dtype)
    codes = torch.randint(0, 256, case.kv.shape, dtype=torch.uint8)
    codes[(codes & 0x7F) == 0x7F] = 0x7E  # the two codes for NaN are never written
    case.kv = codes.view(stored) if stored == torch.float8_e4m3fn else codes.view(torch.int8).clamp(-127)
    scales = (0.2 + torch.rand(2, 2, 2)) / case.kv.float().abs().max()
    expected = truth(case, 1, 0.2, kv_scales=scales)
    largest = (case.kv.float().abs().amax() * scales[1, 1].max()).double()
    check(case, *run(case, 1, 0.2, kv_scales=scales), expected, largest)


def test_merging_disjoint_key_sets_gives_their_union():
    case = PagedCase([(20, 1), (13, 1), (30, 1)])
    whole = truth(case, 0, 0.3)
    parts = []
    for half in (0, 1):  # keys 0 .. 7 of every row, then the others, as two batches
        cut = np.full(3, 8, np.int32)
        starts = cut - 1 if half == 0 else case.batch.starts - cut
        tables = case.tables[:, :2] if half == 0 else case.tables[:, 2:]
        piece = PagedCase([(0, 1)])
        piece.kv, piece.q = case.kv, case.q
        piece.batch = RaggedBatch(starts, case.batch.offsets, np.ascontiguousarray(tables))
        parts.append(run(piece, 0, 0.3))
    o = torch.stack([parts[0][0], parts[1][0]], 1).reshape(6, *case.q.shape[1:])
    lse = torch.stack([parts[0][1], parts[1][1]], 1).reshape(6, -1)
    out, state = gpu.merge_states(o, lse, torch.tensor([0, 2, 4, 6]))
    check(case, out, state, whole)


@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=6),
    heads=st.integers(1, 3),
    dim=st.sampled_from([1, 16, 48]),
    seed=st.integers(0, 99),
)
@settings(max_examples=15, deadline=None)
def test_merges_of_any_number_of_states(sizes, heads, dim, seed):
    torch.manual_seed(seed)
    indptr = torch.tensor([0, *np.cumsum(sizes)], dtype=torch.int32)
    o, lse = torch.randn(int(indptr[-1]), heads, dim), 30 * torch.randn(int(indptr[-1]), heads)
    lse[torch.rand(lse.shape) < 0.3] = float("-inf")
    o[lse == float("-inf")] = float("nan")  # an empty set's result counts for nothing
    out, state = gpu.merge_states(o, lse, indptr)
    expected = reference.merge_states(o.double(), lse.double(), indptr)
    torch.testing.assert_close(out.double(), expected[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(state.double(), expected[1], atol=1e-5, rtol=1e-5)
    empty = state == float("-inf")
    assert (out[empty] == 0).all()
