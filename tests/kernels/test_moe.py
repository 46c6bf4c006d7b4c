"""Mixture of experts: the choice against a plain loop, products against float64 token by token, refusals."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.kernels import dispatch, ops
from penstock.kernels.cpu import moe as cpu
from penstock.kernels.errors import KernelInputError
from penstock.kernels.reference import moe as reference


def choose_by_hand(logits, top_k, scoring, bias, groups, top_groups):
    """Ids of one token, by sorting pairs: largest merit first, then lowest id."""
    scores = logits.softmax(0) if scoring == "softmax" else logits.sigmoid()
    merit = (logits if bias is None else scores + bias).tolist()
    allowed = range(len(merit))
    if groups:
        members = len(merit) // groups
        best = [sorted(merit[g * members : (g + 1) * members], reverse=True) for g in range(groups)]
        worth = [sum(each[:2]) if bias is not None else each[0] for each in best]
        chosen = sorted(range(groups), key=lambda g: (-worth[g], g))[:top_groups]
        allowed = [e for e in allowed if e // members in chosen]
    return sorted(allowed, key=lambda e: (-merit[e], e))[:top_k], scores


@given(
    tokens=st.sampled_from([0, 1, 5]),
    experts=st.sampled_from([(4, 0, 0), (8, 4, 2), (12, 3, 1), (7, 0, 0), (1, 0, 0)]),
    top_k=st.integers(1, 4),
    scoring=st.sampled_from(["softmax", "sigmoid"]),
    biased=st.booleans(),
    renormalize=st.booleans(),
    coarse=st.booleans(),
    scaling=st.sampled_from([1.0, 2.5]),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_choice(tokens, experts, top_k, scoring, biased, renormalize, coarse, scaling, seed):
    torch.manual_seed(seed)
    count, groups, top_groups = experts
    top_k = min(top_k, count)
    # Coarse logits tie often.
    logits = torch.randn(tokens, count).round(decimals=0 if coarse else 3).double()
    bias = torch.randn(count).double() if biased else None
    ids, weights = reference.route_experts(
        logits,
        top_k,
        scoring=scoring,
        renormalize=renormalize,
        selection_bias=bias,
        groups=groups,
        top_groups=top_groups,
        scaling=scaling,
    )
    assert (ids.dtype, weights.dtype) == (torch.int32, torch.float32)
    assert ids.shape == weights.shape == (tokens, top_k)
    for token in range(tokens):
        expected, scores = choose_by_hand(logits[token], top_k, scoring, bias, groups, top_groups)
        assert ids[token].tolist() == expected
        share = scores[expected] / (scores[expected].sum() if renormalize else 1)
        assert torch.allclose(weights[token].double(), share * scaling, atol=1e-6)


def test_a_token_with_nan_gets_experts_and_nan_weights():
    logits = torch.randn(3, 6)
    logits[1, 2] = float("nan")
    logits[2] = -float("inf")
    ids, weights = ops.route_experts(logits, 3)
    assert weights[0].isfinite().all()
    assert weights[1].isnan().all()
    assert 2 not in ids[1].tolist()
    assert ids[2].tolist() == [0, 1, 2]
    assert weights[2].isnan().all()


def test_checked_mode_tells_of_nan_and_of_ids(monkeypatch):
    monkeypatch.setenv("PENSTOCK_KERNELS_CHECKED", "1")
    dispatch.checked.cache_clear()
    try:
        with pytest.raises(KernelInputError, match="route_experts: logits: holds a NaN"):
            ops.route_experts(torch.full((2, 4), float("nan")), 1)
    finally:
        monkeypatch.undo()
        dispatch.checked.cache_clear()


def token_by_token(x, gate_up, down, ids, weights, activation):
    out = torch.zeros_like(x)
    for token in range(len(x)):
        for place, expert in enumerate(ids[token].tolist()):
            if expert >= 0:
                gate, up = (gate_up[expert] @ x[token]).chunk(2)
                act = torch.nn.functional.silu(gate)
                if activation == "gelu":
                    act = torch.nn.functional.gelu(gate, approximate="tanh")
                out[token] += weights[token, place] * (down[expert] @ (act * up))
    return out


@given(
    tokens=st.sampled_from([0, 1, 7, 65]),
    experts=st.sampled_from([(1, 1), (4, 2), (5, 5), (16, 3)]),
    inputs=st.sampled_from([8, 33]),
    width=st.sampled_from([4, 17]),
    activation=st.sampled_from(["silu", "gelu"]),
    skew=st.sampled_from(["spread", "one", "none"]),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_products(tokens, experts, inputs, width, activation, skew, seed):
    torch.manual_seed(seed)
    count, chosen = experts
    gate_up = torch.randn(count, 2 * width, inputs) / inputs**0.5
    down = torch.randn(count, inputs, width) / width**0.5
    x = torch.randn(tokens, inputs)
    ids, weights = ops.route_experts(torch.randn(tokens, count), chosen)
    if skew == "one":
        ids[:] = count - 1
    if skew == "none":
        ids[::2] = -1
    tensors = [each.double() for each in (x, gate_up, down)]
    expected = token_by_token(*tensors, ids, weights.double(), activation)
    for implementation, dtype, bound in (
        (reference, torch.float64, 1e-12),
        (cpu, torch.float32, 1e-5),
        (ops, torch.float32, 1e-5),
        (reference, torch.bfloat16, None),
        (cpu, torch.bfloat16, None),
        (ops, torch.bfloat16, None),
    ):
        own = [each.to(dtype) for each in (x, gate_up, down)]
        out = implementation.fused_moe(own[0], implementation.pack_experts(*own[1:]), ids, weights, activation)
        assert (out.shape, out.dtype) == (x.shape, dtype)
        exact = expected
        if bound is None:
            exact = token_by_token(*[each.double() for each in own], ids, weights.double(), activation)
            # The products of gate, up and the hidden vector are rounded to bfloat16 before the last one.
            bound = 2**-8 * 6
        assert ((out.double() - exact).abs() <= bound * (1 + exact.abs())).all()


def test_an_idle_choice_adds_nothing_even_with_a_nan_weight():
    gate_up, down = torch.randn(2, 8, 6), torch.randn(2, 6, 4)
    ids, weights = torch.tensor([[0, -1]]), torch.tensor([[1.0, float("nan")]])
    for implementation in (cpu, reference, ops):
        out = implementation.fused_moe(torch.randn(1, 6), implementation.pack_experts(gate_up, down), ids, weights)
        assert out.isfinite().all()


@pytest.mark.parametrize("implementation", [dispatch.CPU, reference, ops], ids=["cpu", "reference", "ops"])
def test_what_cannot_be_served_is_told(implementation):
    gate_up, down = torch.randn(4, 6, 8), torch.randn(4, 8, 3)
    packed = implementation.pack_experts(gate_up, down)
    x, ids, weights = torch.randn(2, 8), torch.zeros(2, 1, dtype=torch.int32), torch.ones(2, 1)
    cases = [
        ("x", lambda: implementation.fused_moe(torch.randn(2, 7), packed, ids, weights)),
        ("x", lambda: implementation.fused_moe(x.double(), packed, ids, weights)),
        ("ids", lambda: implementation.fused_moe(x, packed, ids.float(), weights)),
        ("ids", lambda: implementation.fused_moe(x, packed, ids[:1], weights)),
        ("ids", lambda: implementation.fused_moe(x, packed, ids + 4, weights)),
        ("ids", lambda: implementation.fused_moe(x, packed, ids - 2, weights)),
        ("weights", lambda: implementation.fused_moe(x, packed, ids, torch.ones(2, 2))),
        ("activation", lambda: implementation.fused_moe(x, packed, ids, weights, "relu")),
        ("gate_up", lambda: implementation.pack_experts(torch.randn(4, 5, 8), down)),
        ("gate_up", lambda: implementation.pack_experts(torch.randn(6, 8), down)),
        ("down", lambda: implementation.pack_experts(gate_up, down.transpose(1, 2))),
        ("down", lambda: implementation.pack_experts(gate_up, down.double())),
        ("logits", lambda: implementation.route_experts(torch.randn(4), 1)),
        ("logits", lambda: implementation.route_experts(torch.ones(2, 4, dtype=torch.int32), 1)),
        ("top_k", lambda: implementation.route_experts(torch.randn(2, 4), 5)),
        ("top_k", lambda: implementation.route_experts(torch.randn(2, 4), 0)),
        ("top_k", lambda: implementation.route_experts(torch.randn(2, 4), 3, groups=2, top_groups=1)),
        ("scoring", lambda: implementation.route_experts(torch.randn(2, 4), 1, scoring="tanh")),
        ("groups", lambda: implementation.route_experts(torch.randn(2, 4), 1, groups=3, top_groups=1)),
        ("top_groups", lambda: implementation.route_experts(torch.randn(2, 4), 1, groups=2, top_groups=3)),
        ("top_groups", lambda: implementation.route_experts(torch.randn(2, 4), 1, top_groups=1)),
        ("selection_bias", lambda: implementation.route_experts(torch.randn(2, 4), 1, selection_bias=torch.ones(3))),
    ]
    for argument, call in cases:
        with pytest.raises(KernelInputError) as told:
            call()
        assert told.value.argument.split()[0] == argument
