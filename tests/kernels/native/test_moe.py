"""C++ mixture of experts against the float64 reference."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from penstock.kernels.errors import KernelInputError
from penstock.kernels.native import moe as native
from penstock.kernels.reference import moe as reference

UNITS = {torch.float32: 1e-5, torch.bfloat16: 2**-6}


@given(
    st.integers(0, 40), st.integers(1, 9), st.integers(1, 60), st.integers(1, 80), st.sampled_from(list(UNITS)),
    st.sampled_from(["silu", "gelu"]), st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_against_float64(level, tokens, experts, inputs, width, dtype, activation, seed):
    torch.manual_seed(seed)
    chosen = int(torch.randint(1, experts + 1, ()))
    x = torch.randn(tokens, inputs).to(dtype)
    gate_up = (torch.randn(experts, 2 * width, inputs) / inputs**0.5).to(dtype)
    down = (torch.randn(experts, inputs, width) / width**0.5).to(dtype)
    ids = torch.rand(tokens, experts).argsort(dim=1)[:, :chosen].to(torch.int32)
    ids[::5, 0] = -1
    weights = torch.rand(tokens, chosen)
    ours = native.fused_moe(x, native.pack_experts(gate_up, down), ids, weights, activation)
    plain = reference.pack_experts(gate_up.double(), down.double())
    truth = reference.fused_moe(x.double(), plain, ids, weights, activation)
    assert ours.dtype is dtype
    torch.testing.assert_close(ours.double(), truth, atol=UNITS[dtype] * 4, rtol=UNITS[dtype])


def test_a_token_does_not_depend_on_the_others(level):
    torch.manual_seed(0)
    packed = native.pack_experts(torch.randn(8, 64, 96), torch.randn(8, 96, 32))
    x, ids, weights = torch.randn(50, 96), torch.randint(0, 8, (50, 2)), torch.rand(50, 2)
    together = native.fused_moe(x, packed, ids, weights)
    assert torch.equal(native.fused_moe(x[7:9], packed, ids[7:9], weights[7:9]), together[7:9])


def test_an_expert_that_does_not_exist_is_refused():
    packed = native.pack_experts(torch.randn(2, 8, 4), torch.randn(2, 4, 4))
    with pytest.raises(KernelInputError, match="ids"):
        native.fused_moe(torch.randn(1, 4), packed, torch.tensor([[2]]), torch.ones(1, 1))
