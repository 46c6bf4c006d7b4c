"""Mixture of experts in Triton: choice equal to the reference's, alignment's invariants, products, steadiness."""

import pytest
import torch

pytest.importorskip("triton")

from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.kernels.errors import KernelInputError
from penstock.kernels.gpu import moe, moe_alignment, moe_gemm
from penstock.kernels.reference import moe as reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@given(
    tokens=st.sampled_from([0, 1, 5]),
    experts=st.sampled_from([(4, 0, 0), (8, 4, 2), (12, 3, 1), (7, 0, 0), (1, 0, 0), (40, 0, 0)]),
    top_k=st.integers(1, 4),
    scoring=st.sampled_from(["softmax", "sigmoid"]),
    biased=st.booleans(),
    renormalize=st.booleans(),
    strange=st.sampled_from([0.0, float("nan"), float("inf"), -float("inf")]),
    scaling=st.sampled_from([1.0, 2.5]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_choice(tokens, experts, top_k, scoring, biased, renormalize, strange, scaling, dtype, seed):
    torch.manual_seed(seed)
    count, groups, top_groups = experts
    logits = torch.randn(tokens, count, device=DEVICE).round(decimals=1).to(dtype)
    logits[1:2, :2] = strange
    bias = torch.randn(count, device=DEVICE).round(decimals=1) if biased else None
    how = {"scoring": scoring, "renormalize": renormalize, "selection_bias": bias}
    how |= {"groups": groups, "top_groups": top_groups, "scaling": scaling}
    ids, weights = moe.route_experts(logits, min(top_k, count), **how)
    expected_ids, expected_weights = reference.route_experts(logits, min(top_k, count), **how)
    assert (ids.dtype, weights.dtype) == (torch.int32, torch.float32)
    if not (biased and strange):
        assert torch.equal(ids, expected_ids)
        assert torch.allclose(weights, expected_weights, atol=1e-6, equal_nan=True)
    assert all(len(set(row)) == len(row) and set(row) <= set(range(count)) for row in ids.tolist())


@given(
    tokens=st.sampled_from([1, 2, 7, 40, 300]),
    experts=st.sampled_from([(1, 1), (4, 2), (5, 5), (40, 3), (300, 2)]),
    block_t=st.sampled_from([16, 32]),
    skew=st.sampled_from(["spread", "one", "idle", "wrong"]),
    seed=st.integers(0, 99),
)
@settings(max_examples=30, deadline=None)
def test_alignment(tokens, experts, block_t, skew, seed):
    torch.manual_seed(seed)
    count, chosen = experts
    ids = torch.rand(tokens, count).argsort(1)[:, :chosen].to(torch.int32).contiguous()
    if skew == "one":
        ids[:] = count - 1
    if skew == "idle":
        ids[::3] = -1
    if skew == "wrong":
        ids[0, 0] = count
    blocks = moe_alignment.align(ids.to(DEVICE), count, block_t)
    flat = ids.flatten().long()
    order = torch.sort(flat, stable=True).indices
    expected = [row for row in order.tolist() if 0 <= flat[row] < count]
    seen = []
    table = zip(blocks.experts.tolist(), blocks.starts.tolist(), blocks.counts.tolist(), strict=True)
    for expert, start, size in table:
        assert 0 <= size <= block_t
        if size:
            assert start == len(seen)
            rows = blocks.order[start : start + size].tolist()
            assert all(flat[row] == expert for row in rows)
            seen += rows
    assert seen == expected
    assert len(blocks.counts) == moe_alignment.most_blocks(flat.numel(), count, block_t)


@given(
    tokens=st.sampled_from([0, 1, 7, 65]),
    experts=st.sampled_from([(1, 1), (4, 2), (5, 5), (16, 3)]),
    inputs=st.sampled_from([8, 33, 64]),
    width=st.sampled_from([4, 17, 70]),
    activation=st.sampled_from(["silu", "gelu"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    skew=st.sampled_from(["spread", "one", "idle"]),
    seed=st.integers(0, 99),
)
@settings(max_examples=12, deadline=None)
def test_products(tokens, experts, inputs, width, activation, dtype, skew, seed):
    torch.manual_seed(seed)
    count, chosen = experts
    gate_up = (torch.randn(count, 2 * width, inputs, device=DEVICE) / inputs**0.5).to(dtype)
    down = (torch.randn(count, inputs, width, device=DEVICE) / width**0.5).to(dtype)
    x = torch.randn(tokens, inputs, device=DEVICE).to(dtype)
    ids, weights = reference.route_experts(torch.randn(tokens, count, device=DEVICE), chosen)
    if skew == "one":
        ids[:] = count - 1
    if skew == "idle":
        ids[::2], weights[::2] = -1, float("nan")
    out = moe.fused_moe(x, moe.pack_experts(gate_up, down), ids, weights, activation)
    packed = reference.pack_experts(gate_up.double(), down.double())
    exact = reference.fused_moe(x.double(), packed, ids, weights.double(), activation)
    assert (out.shape, out.dtype) == (x.shape, dtype)
    # Only the hidden vector and the result are rounded to the dtype; each row of `down` has length about one.
    step = {torch.float32: 2**-18, torch.bfloat16: 2**-8, torch.float16: 2**-10}[dtype]
    assert ((out.double() - exact).abs() <= step * (exact.abs() + 4)).all()


def test_results_are_steady_and_do_not_depend_on_neighbours():
    torch.manual_seed(0)
    gate_up, down = torch.randn(6, 40, 48, device=DEVICE), torch.randn(6, 48, 20, device=DEVICE)
    x = torch.randn(30, 48, device=DEVICE)
    ids, weights = reference.route_experts(torch.randn(30, 6, device=DEVICE), 2)
    packed = moe.pack_experts(gate_up, down)
    together = moe.fused_moe(x, packed, ids, weights)
    assert torch.equal(moe.fused_moe(x, packed, ids, weights), together)
    some = [4, 17, 29]
    assert torch.equal(moe.fused_moe(x[some], packed, ids[some], weights[some]), together[some])


def test_bounds_of_blocks_are_met():
    for rows, experts, block in ((1, 8, 16), (8, 8, 16), (100, 3, 16), (4096, 128, 64)):
        worst = min(rows, experts)
        counts = [1] * (worst - 1) + [rows - worst + 1] if worst else []
        assert sum(-(-count // block) for count in counts) <= moe_alignment.most_blocks(rows, experts, block)


def test_large_tiles_give_the_same_numbers():
    torch.manual_seed(0)
    gate_up, down = torch.randn(2, 24, 32, device=DEVICE), torch.randn(2, 32, 12, device=DEVICE)
    x, ids = torch.randn(40, 32, device=DEVICE), torch.randint(0, 2, (40, 1), dtype=torch.int32, device=DEVICE)
    weights = torch.ones(40, 1, device=DEVICE)
    packed = moe.pack_experts(gate_up, down)
    expected = moe.fused_moe(x, packed, ids, weights)
    config = {"BLOCK_T": 64, "BLOCK_M": 16, "BLOCK_K": 16, "GROUP_T": 2, "num_warps": 4, "num_stages": 2}
    blocks = moe_alignment.align(ids, 2, 64)
    hidden = moe_gemm.gate_up(x, gate_up, blocks, 1, False, config)
    out = torch.empty_like(x)
    moe_gemm.sum_terms(moe_gemm.down(hidden, down, weights, blocks, config), ids, out, 2)
    assert torch.allclose(out, expected, atol=1e-4)


def test_wrong_inputs_are_told():
    packed = moe.pack_experts(torch.randn(2, 6, 8, device=DEVICE), torch.randn(2, 8, 3, device=DEVICE))
    ids, weights = torch.zeros(2, 1, dtype=torch.int32, device=DEVICE), torch.ones(2, 1, device=DEVICE)
    with pytest.raises(KernelInputError, match="fused_moe: x"):
        moe.fused_moe(torch.randn(2, 7, device=DEVICE), packed, ids, weights)
    with pytest.raises(KernelInputError, match="fused_moe: activation"):
        moe.fused_moe(torch.randn(2, 8, device=DEVICE), packed, ids, weights, "relu")
    with pytest.raises(KernelInputError, match="route_experts: top_k"):
        moe.route_experts(torch.randn(2, 4, device=DEVICE), 5)
