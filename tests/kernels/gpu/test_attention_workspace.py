"""Plans in memory that stays: the same addresses, grids of the maxima, padding that is 0, batches over the limits."""

import numpy as np
import pytest
import torch
from fakes.in_ci import every
from fakes.paged_case import PagedCase

pytest.importorskip("triton")

from penstock.kernels.errors import KernelInputError
from penstock.kernels.gpu import attention as gpu
from penstock.kernels.gpu import kv_blocks
from penstock.kernels.gpu.attention_plan import PlanSettings
from penstock.kernels.gpu.attention_workspace import make_workspace
from penstock.kernels.ragged import AttentionLimits, RaggedBatch
from penstock.kernels.reference import attention as reference
from penstock.kernels.reference import kv_blocks as reference_kv_blocks
from penstock.kernels.shared_prefix import SharingRule

# Toy chunks and no costs, so that short rows are split and shared.
HOW = PlanSettings(
    sm_count=16, min_chunk=8, sharing=SharingRule(3, 8), decode_overhead=0, tile_overhead=0, merge_cost=0
)
TENSORS = (
    "counts decode_items tile_items tokens positions write_slots merge_tokens merge_indptr merge_slots tables "
    "partial_o partial_lse"
).split()


def workspace_of(case, **limits):
    limits = {"max_rows": 6, "max_tokens": 6, "max_length": 64, "query_heads": case.q.shape[1], **limits}
    return make_workspace(case.kv, AttentionLimits(**limits), HOW)


def launched(plan):
    """All that a captured launch would hold on to."""
    (prepared,) = plan.prepared.values()
    sizes = (prepared.num_decode, prepared.num_tile, prepared.num_merge, prepared.query_tile)
    return sizes, [getattr(prepared, name).data_ptr() for name in TENSORS]


def truth(case, q, **limits):
    plan = reference.plan_attention(case.kv, case.batch)
    return reference.paged_attention(q.double(), case.kv.double(), 1, plan, 0.3, **limits)


STEPS = [
    [(50, 1), (3, 1), (20, 1)],
    [(0, 1)],
    [(24, 1), (25, 1), (26, 1), (27, 1), (28, 1), (50, 1)],
    [(7, 1), (63, 1)],
]


@pytest.mark.parametrize("window", [0, 10])
def test_steps_of_one_workspace_launch_alike_and_agree_with_float64(window):
    first = PagedCase(STEPS[0], heads=2, group=2)
    workspace, seen = workspace_of(first, padded=True), []
    for number, rows in enumerate(STEPS):
        case = PagedCase(rows, heads=2, group=2, seed=number)
        if number == 2:
            case.tables[:5, :6] = case.tables[0, :6]
        plan = gpu.plan_attention(case.kv, case.batch, workspace)
        seen.append(launched(plan))
        tokens = case.batch.num_tokens
        q = torch.full((6, 4, 16), float("nan"))
        q[:tokens] = case.q
        out, lse = gpu.paged_attention_with_lse(q, case.kv, 1, plan, 0.3, window=window)
        torch.testing.assert_close(out[:tokens].double(), truth(case, case.q, window=window), atol=1e-5, rtol=1e-5)
        assert (out[tokens:] == 0).all()
        assert (lse[tokens:] == float("-inf")).all()
    assert seen.count(seen[0]) == len(seen)


def test_a_decode_workspace_too_small_to_share_launches_no_tiles():
    case = PagedCase([(9, 1), (30, 1)])
    for rows, tiles in ((2, False), (6, True)):
        plan = gpu.plan_attention(case.kv, case.batch, workspace_of(case, max_rows=rows, max_tokens=rows, padded=True))
        assert bool(launched(plan)[0][1]) == tiles


def test_padding_is_written_nowhere():
    case, twin = PagedCase(STEPS[0]), PagedCase(STEPS[0])
    plan = gpu.plan_attention(case.kv, case.batch, workspace_of(case, padded=True))
    kv_blocks.write_kv(case.kv, 1, torch.cat([case.new, torch.full((3, 2, 2, 16), 9.0)]), plan)
    reference_kv_blocks.write_kv(twin.kv, 1, twin.new, reference.plan_attention(twin.kv, twin.batch))
    assert torch.equal(case.kv, twin.kv)


@pytest.mark.parametrize("limits", every(3, [{}, {"fixed_split": 16}, {"padded": True}, {"shared_prefix": False}]))
def test_mixed_steps_in_a_workspace(limits):
    workspace = None
    for seed, rows in enumerate(([(9, 1), (0, 7), (30, 1), (6, 6)], [(40, 20), (3, 1)], [(12, 2)] * 5)):
        case = PagedCase(rows, seed=seed)
        workspace = workspace or workspace_of(case, max_tokens=24, **limits)
        plan = gpu.plan_attention(case.kv, case.batch, workspace)
        out = gpu.paged_attention(case.q, case.kv, 1, plan, 0.3)
        torch.testing.assert_close(out.double(), truth(case, case.q), atol=1e-5, rtol=1e-5)


def test_a_fixed_split_workspace_is_batch_invariant():
    case = PagedCase([(40, 1), (9, 7), (33, 1)])
    workspace = workspace_of(case, max_tokens=24, fixed_split=16)
    together = gpu.paged_attention(case.q, case.kv, 1, gpu.plan_attention(case.kv, case.batch, workspace), 0.3)
    for row, tokens in enumerate((slice(0, 1), slice(1, 8), slice(8, 9))):
        count = tokens.stop - tokens.start
        one = RaggedBatch(case.batch.starts[[row]], np.array([0, count], np.int32), case.tables[[row]])
        alone = gpu.paged_attention(case.q[tokens], case.kv, 1, gpu.plan_attention(case.kv, one, workspace), 0.3)
        assert torch.equal(alone, together[tokens])


@pytest.mark.parametrize("rows", [[(0, 1)] * 7, [(0, 4), (0, 3)], [(64, 1)]], ids=["rows", "tokens", "length"])
def test_a_batch_over_the_limits_is_refused(rows):
    case = PagedCase(rows)
    with pytest.raises(KernelInputError, match=r"plan_attention: batch: larger than the workspace's limits") as caught:
        gpu.plan_attention(case.kv, case.batch, workspace_of(case))
    assert (caught.value.op, caught.value.argument) == ("plan_attention", "batch")


def test_plans_and_workspaces_of_another_backend_are_refused():
    case = PagedCase([(0, 1)])
    foreign = reference.attention_workspace(case.kv, AttentionLimits(1, 1, 8, 6))
    with pytest.raises(TypeError, match="another backend than gpu"):
        gpu.plan_attention(case.kv, case.batch, foreign)
    with pytest.raises(TypeError, match="another backend than gpu"):
        gpu.paged_attention(case.q, case.kv, 0, reference.plan_attention(case.kv, case.batch), 0.3)


def test_too_few_or_too_many_tokens_are_refused():
    case = PagedCase(STEPS[0])
    plan = gpu.plan_attention(case.kv, case.batch)
    for q in (case.q[:2], torch.cat([case.q, case.q])):
        with pytest.raises(KernelInputError, match=r"paged_attention: q: . tokens; the plan has 3"):
            gpu.paged_attention(q, case.kv, 0, plan, 0.3)
    with pytest.raises(KernelInputError, match="the plan has 6"):
        gpu.paged_attention(
            case.q.repeat(3, 1, 1),
            case.kv,
            0,
            gpu.plan_attention(case.kv, case.batch, workspace_of(case, padded=True)),
            0.3,
        )
