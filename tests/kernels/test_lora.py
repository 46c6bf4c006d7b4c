"""Multi-adapter updates: torch implementations against float64, against merged weights, refusals."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.kernels import ops
from penstock.kernels.cpu import lora as cpu
from penstock.kernels.errors import KernelInputError
from penstock.kernels.reference import lora as reference

ROUNDING = {torch.float32: 2**-23, torch.bfloat16: 2**-8, torch.float16: 2**-10}


def by_hand(y, x, a, b, scales, slots):
    """(result, bound), token by token in float64."""
    exact, bound = y.double(), torch.zeros(y.shape, dtype=torch.float64)
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            exact[token] += scales[slot].double() * (b[slot].double() @ (a[slot].double() @ x[token].double()))
            most = x[token].abs().max().double() * a[slot].abs().max().double() * b[slot].abs().max().double()
            bound[token] = x.shape[1] * a.shape[1] * 2**-23 * most * scales[slot]
    return exact, bound + ROUNDING[y.dtype] * exact.abs()


@given(
    tokens=st.sampled_from([0, 1, 7, 16, 65]),
    shape=st.sampled_from([(5, 9), (64, 24), (130, 7)]),
    rank=st.sampled_from([1, 8, 12, 64]),
    slots=st.sampled_from([1, 3, 20]),
    dtype=st.sampled_from(list(ROUNDING)),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_against_float64(tokens, shape, rank, slots, dtype, seed):
    torch.manual_seed(seed)
    inputs, outputs = shape
    used = torch.randint(-1, slots, (tokens,))
    x, a, b = torch.randn(tokens, inputs), torch.randn(slots, rank, inputs), torch.randn(slots, outputs, rank)
    x, a, b, scales = x.to(dtype), a.to(dtype), b.to(dtype), torch.rand(slots)
    wide = torch.randn(tokens, outputs + 5).to(dtype)
    exact, bound = by_hand(wide[:, 2:-3], x, a, b, scales, used)
    for implementation in (cpu, reference, ops):
        storage = wide.clone()
        y = storage[:, 2:-3]  # rows of a wider tensor, as a slice of a joint projection is
        implementation.lora_add(y, x, a, b, scales, implementation.plan_lora(used))
        assert ((y.double() - exact).abs() <= bound).all()
        assert torch.equal(storage[:, :2], wide[:, :2])
        assert torch.equal(storage[:, -3:], wide[:, -3:])


def test_merged_weights_are_the_same():
    torch.manual_seed(0)
    weight, a, b = torch.randn(24, 32).double(), torch.randn(2, 8, 32).double(), torch.randn(2, 24, 8).double()
    x, scales = torch.randn(5, 32).double(), torch.tensor([0.5, 2.0]).double()
    y = x @ weight.T
    reference.lora_add(y, x, a, b, scales, reference.plan_lora(torch.ones(5, dtype=torch.int64)))
    assert (y - x @ (weight + 2.0 * b[1] @ a[1]).T).abs().max() < 1e-11


def test_a_plan_is_a_stable_sort_with_segments():
    plan = ops.plan_lora(torch.tensor([2, -1, 0, 2, 0, -1, 7], dtype=torch.int32))
    assert plan.order.tolist() == [2, 4, 0, 3, 6]
    assert plan.segments == ((0, 0, 2), (2, 2, 4), (7, 4, 5))
    assert (plan.num_tokens, plan.num_slots) == (7, 8)
    assert ops.plan_lora(torch.full((3,), -1)).segments == ()


def test_what_cannot_be_served_is_told():
    y, x, a, b, scales = torch.randn(3, 6), torch.randn(3, 8), torch.randn(2, 4, 8), torch.randn(2, 6, 4), torch.ones(2)
    plan = ops.plan_lora(torch.tensor([0, 1, -1]))
    cases = [
        ("x", lambda: ops.lora_add(y, x[:2], a, b, scales, plan)),
        ("x", lambda: ops.lora_add(y, torch.randn(8, 3).t(), a, b, scales, plan)),
        ("x", lambda: ops.lora_add(y, torch.ones(3, 8, dtype=torch.int64), a, b, scales, plan)),
        ("y", lambda: ops.lora_add(y[:2], x, a, b, scales, plan)),
        ("y", lambda: ops.lora_add(y.double(), x, a, b, scales, plan)),
        ("a", lambda: ops.lora_add(y, x, a[:, :, :7], b, scales, plan)),
        ("a", lambda: ops.lora_add(y, x, torch.randn(2, 300, 8), torch.randn(2, 6, 300), scales, plan)),
        ("b", lambda: ops.lora_add(y, x, a, b[:, :5], scales, plan)),
        ("scales", lambda: ops.lora_add(y, x, a, b, torch.ones(3), plan)),
        ("scales", lambda: ops.lora_add(y, x, a, b, scales.to(torch.int32), plan)),
        ("plan", lambda: ops.lora_add(y, x, a, b, scales, ops.plan_lora(torch.tensor([0, 2, -1])))),
        ("slots", lambda: ops.plan_lora(torch.tensor([0, -2]))),
        ("slots", lambda: ops.plan_lora(torch.tensor([0.0]))),
        ("slots", lambda: ops.plan_lora(torch.zeros(2, 2, dtype=torch.int64))),
    ]
    for argument, call in cases:
        with pytest.raises(KernelInputError) as told:
            call()
        assert told.value.argument == argument
