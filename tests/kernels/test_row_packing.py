"""Weights packed from pieces are those packed whole, whatever the pieces and the backend."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.kernels import ops
from penstock.kernels.native.moe import PanelExperts
from penstock.kernels.row_packing import SCRATCH_BYTES, ExpertsPacking, WeightPacking, new_scratch

CPU = torch.device("cpu")


def put_in_pieces(rows, matrix, seed):
    generator, begin = torch.Generator().manual_seed(seed), 0
    while begin < len(matrix):
        count = int(torch.randint(1, 200, (), generator=generator))
        rows.put(matrix[begin : begin + count])
        begin += count


@given(
    st.integers(1, 300), st.integers(1, 90), st.sampled_from(["float32", "bfloat16", "float16"]), st.booleans(),
    st.integers(0, 9),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_a_weight(outputs, inputs, dtype, with_bias, seed):
    torch.manual_seed(seed)
    kind = getattr(torch, dtype)
    weight, bias = torch.randn(outputs, inputs), torch.randn(outputs).to(kind) if with_bias else None
    packing = WeightPacking((outputs, inputs), kind, CPU, new_scratch())
    put_in_pieces(packing.rows, weight, seed)
    pieced, whole = packing.finish(bias), ops.pack_weight(weight.to(kind), bias)
    assert type(pieced) is type(whole)
    assert (pieced.num_outputs, pieced.num_inputs) == (outputs, inputs)
    x = torch.randn(3, inputs).to(kind)
    assert torch.equal(ops.linear(x, pieced), ops.linear(x, whole))


def test_rows_longer_than_the_scratch():
    inputs = SCRATCH_BYTES // 4 // 64 + 3
    weight = torch.randn(70, inputs)
    packing = WeightPacking((70, inputs), torch.float32, CPU, new_scratch())
    packing.rows.put(weight)
    assert torch.equal(packing.finish().weight, ops.pack_weight(weight).weight)


@pytest.mark.parametrize("width", [12, 13])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts(width, dtype):
    torch.manual_seed(1)
    gate_up, down = torch.randn(3, 2 * width, 40), torch.randn(3, 40, width)
    packing = ExpertsPacking((3, width, 40), dtype, CPU, new_scratch())
    for expert in range(3):
        for rows, matrix in ((packing.gate_up(expert), gate_up), (packing.down(expert), down)):
            put_in_pieces(rows, matrix[expert], expert)
            rows.flush()
    pieced, whole = packing.finish(), ops.pack_experts(gate_up.to(dtype), down.to(dtype))
    assert isinstance(pieced, PanelExperts) == (width == 12 or dtype is torch.float32)
    x, ids = torch.randn(5, 40).to(dtype), torch.tensor([[0, 2], [1, 0], [2, 1], [0, 1], [2, 0]])
    weights = torch.rand(5, 2)
    assert torch.equal(ops.fused_moe(x, pieced, ids, weights), ops.fused_moe(x, whole, ids, weights))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_missing_rows_are_an_error(dtype):
    packing = WeightPacking((130, 8), dtype, CPU, new_scratch())
    packing.rows.put(torch.zeros(64, 8))
    with pytest.raises(ValueError, match="rows"):
        packing.finish()
