"""Writing and copying KV blocks: nothing but the named slots changes, and both implementations agree."""

import pytest
import torch
from fakes.paged_case import PagedCase

from penstock.kernels import ops
from penstock.kernels.cpu import attention as cpu_attention
from penstock.kernels.cpu import kv_blocks as cpu
from penstock.kernels.reference import kv_blocks as reference

ROWS = [(5, 1), (0, 9), (3, 4), (4, 1), (8, 1), (0, 1)]


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_write_kv_changes_exactly_the_new_slots(layer, dtype):
    case = PagedCase(ROWS, dtype=dtype)
    before = case.kv.clone()
    cpu.write_kv(case.kv, layer, case.new, cpu_attention.plan_attention(case.kv, case.batch))
    touched = torch.zeros(case.kv.shape[:5], dtype=torch.bool)
    token = 0
    for row, (start, count) in enumerate(ROWS):
        for position in range(start, start + count):
            block, slot = int(case.tables[row, position // 4]), position % 4
            assert torch.equal(case.kv[block, layer, :, :, slot], case.new[token])
            touched[block, layer, :, :, slot] = True
            token += 1
    assert torch.equal(case.kv[~touched], before[~touched])


def test_both_implementations_agree():
    ours, truth = PagedCase(ROWS), PagedCase(ROWS)
    plan = cpu_attention.plan_attention(ours.kv, ours.batch)
    cpu.write_kv(ours.kv, 1, ours.new, plan)
    reference.write_kv(truth.kv, 1, truth.new, plan)
    assert torch.equal(ours.kv, truth.kv)


@pytest.mark.parametrize("implementation", [cpu, reference])
def test_only_finite_numbers_are_stored(implementation):
    case = PagedCase([(0, 3)])
    case.new[0, 0, 0, 0], case.new[1, 1, 0, 0], case.new[2, 0, 1, 0] = float("nan"), float("inf"), float("-inf")
    implementation.write_kv(case.kv, 0, case.new, cpu_attention.plan_attention(case.kv, case.batch))
    assert torch.isfinite(case.kv).all()


@pytest.mark.parametrize("implementation", [cpu, reference, ops])
def test_copy_blocks_reads_before_it_writes(implementation):
    case = PagedCase([(0, 20)])
    before = case.kv.clone()
    implementation.copy_blocks(case.kv, torch.tensor([[0, 1], [1, 2], [5, 4]]))
    assert torch.equal(case.kv[[1, 2, 4]], before[[0, 1, 5]])
    assert torch.equal(case.kv[[0, 3, 5]], before[[0, 3, 5]])
