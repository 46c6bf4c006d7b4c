"""Latent attention in Triton's interpreter (or on a GPU): against float64, cut in several ways; what it may read."""

from itertools import product

import numpy as np
import pytest
import torch
from fakes.in_ci import every
from fakes.paged_case import PagedCase
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from penstock.kernels.errors import KernelInputError
from penstock.kernels.gpu import attention as gpu_attention
from penstock.kernels.gpu import kv_blocks
from penstock.kernels.gpu import latent_attention as gpu
from penstock.kernels.gpu.attention_plan import PlanSettings
from penstock.kernels.gpu.attention_workspace import GpuPlan, prepare
from penstock.kernels.ragged import AttentionLimits, RaggedBatch
from penstock.kernels.reference import attention as reference_attention
from penstock.kernels.reference import latent_attention as reference
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
SHAPES = [(6, 40, 32, 4), (5, 34, 20, 16), (1, 16, 16, 8), (40, 24, 16, 4)]  # heads, stored, value, slots
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float32]


def latent_case(rows, heads=6, dim=40, **options):
    return PagedCase(rows, heads=1, group=heads, dim=dim, parts=1, **options)


def run(case, layer, scale, value_dim, how=SPLIT):
    heads = case.q.shape[1]
    plan = GpuPlan(case.batch, how, {heads: prepare(case.kv, heads, case.batch, how)}, [])
    return gpu.latent_attention(case.q, case.kv, layer, plan, scale, value_dim)


def check(case, out, layer, scale, value_dim):
    plan = reference_attention.plan_attention(case.kv, case.batch)
    truth = reference.latent_attention(case.q.double(), case.kv.double(), layer, plan, scale, value_dim)
    bound = {torch.float32: 1e-5, torch.bfloat16: 1.5 * 2**-8, torch.float16: 1.5 * 2**-11}[case.q.dtype]
    assert out.dtype == case.q.dtype
    assert out.shape == truth.shape
    assert (out.double() - truth).abs().max() <= (bound + torch.finfo(case.q.dtype).eps) * case.kv.abs().max().double()


@pytest.mark.parametrize(("mix", "how"), every(4, product(MIXES, (SPLIT, UNSPLIT, FIXED))))
def test_against_float64(mix, how):
    case = latent_case(MIXES[mix])
    check(case, run(case, 1, 0.2, 32, how), 1, 0.2, 32)


@pytest.mark.parametrize(("shape", "dtype"), list(zip(SHAPES, DTYPES, strict=True)))
def test_shapes_and_dtypes(shape, dtype):
    heads, dim, value_dim, slots = shape
    case = latent_case(MIXES["everything"], heads, dim, slots=slots, dtype=dtype)
    check(case, run(case, 0, dim**-0.5, value_dim), 0, dim**-0.5, value_dim)


@given(
    rows=st.lists(st.tuples(st.integers(0, 40), st.integers(1, 12)), min_size=1, max_size=4),
    heads=st.integers(1, 9),
    rest=st.integers(0, 20),
    value_dim=st.integers(1, 40),
    how=st.sampled_from([SPLIT, UNSPLIT, FIXED]),
    seed=st.integers(0, 99),
)
@settings(max_examples=4, deadline=None)
def test_any_ragged_batch(rows, heads, rest, value_dim, how, seed):
    case = latent_case(rows, heads, value_dim + rest, seed=seed)
    check(case, run(case, 1, 0.3, value_dim, how), 1, 0.3, value_dim)


def test_shared_prefixes_are_read_together():
    case = latent_case([(16, 1), (18, 1), (17, 2), (30, 1)])
    case.tables[1:, :4] = case.tables[0, :4]
    how = PlanSettings(sm_count=64, min_chunk=16, sharing=SharingRule(min_sharers=2, min_saved_bytes=1), **FREE)
    case.batch = RaggedBatch(case.batch.starts, case.batch.offsets, case.tables)
    assert prepare(case.kv, 6, case.batch, how).num_tile > 0
    check(case, run(case, 0, 0.3, 32, how), 0, 0.3, 32)


def test_a_padded_workspace_and_writing():
    case = latent_case([(9, 1), (3, 1), (30, 1)])
    workspace = gpu_attention.attention_workspace(case.kv, AttentionLimits(5, 5, 64, 6, padded=True))
    plan = gpu_attention.plan_attention(case.kv, case.batch, workspace)
    new = torch.cat((case.new, torch.full((2, 1, 1, 40), 7.0)))
    before = case.kv.clone()
    kv_blocks.write_kv(case.kv, 1, new, plan)
    for row, start in enumerate(case.batch.starts):
        before[case.tables[row, start // 4], 1, 0, 0, start % 4] = case.new[row, 0, 0]
    assert torch.equal(case.kv, before)
    out = gpu.latent_attention(torch.cat((case.q, case.q[:2])), case.kv, 1, plan, 0.2, 32)
    assert (out[3:] == 0).all()
    check(case, out[:3], 1, 0.2, 32)


def test_blocks_move_bit_by_bit():
    case = latent_case([(40, 3), (9, 1)])
    staging = torch.empty(2, *case.kv.shape[1:])
    kv_blocks.gather_blocks(case.kv, torch.tensor([5, 2]), staging)
    assert torch.equal(staging, case.kv[[5, 2]])
    kv_blocks.scatter_blocks(case.kv, torch.tensor([7, 8]), staging)
    assert torch.equal(case.kv[8], staging[1])


def test_stale_slots_and_foreign_blocks_are_not_read():
    case = latent_case([(5, 1), (0, 6)])
    used = np.unique(np.concatenate([case.tables[0, :2], case.tables[1, :2]]))
    others = np.setdiff1d(np.arange(len(case.kv)), used)
    clean = run(case, 0, 0.3, 32)
    case.kv[torch.from_numpy(others)] = float("nan")
    case.kv[case.tables[0, 1], :, :, :, 2:] = float("nan")
    case.kv[case.tables[1, 1], :, :, :, 2:] = float("nan")
    assert torch.equal(run(case, 0, 0.3, 32), clean)


def test_a_plan_of_another_batch_is_refused():
    case = latent_case([(5, 1), (0, 6)])
    plan = gpu_attention.plan_attention(case.kv, case.batch)
    with pytest.raises(KernelInputError, match="q: 6 tokens; the plan has 7"):
        gpu.latent_attention(case.q[:6], case.kv, 0, plan, 1.0, 32)
