"""C++ low-rank updates against the float64 reference, and bitwise the same in any batch."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from penstock.kernels.cpu.lora import plan_lora
from penstock.kernels.errors import KernelInputError
from penstock.kernels.native import lora as native
from penstock.kernels.reference import lora as reference

UNITS = {torch.float32: 1e-5, torch.bfloat16: 2**-7}


@given(
    st.integers(0, 40), st.integers(1, 80), st.integers(1, 70), st.sampled_from([1, 3, 16, 65]), st.integers(1, 5),
    st.sampled_from(list(UNITS)), st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_against_float64(level, tokens, inputs, outputs, rank, slots, dtype, seed):
    torch.manual_seed(seed)
    used, wide = torch.randint(-1, slots, (tokens,)), torch.randn(tokens, outputs + 7).to(dtype)
    x, a = torch.randn(tokens, inputs).to(dtype), (torch.randn(slots, rank, inputs) / inputs**0.5).to(dtype)
    b, scales = (torch.randn(slots, outputs, rank) / rank**0.5).to(dtype), torch.rand(slots)
    truth = wide[:, 3:-4].double()
    reference.lora_add(truth, x.double(), a.double(), b.double(), scales.double(), reference.plan_lora(used))
    ours = wide.clone()
    native.lora_add(ours[:, 3:-4], x, a, b, scales, plan_lora(used))  # a slice of a joint projection
    torch.testing.assert_close(ours[:, 3:-4].double(), truth, atol=UNITS[dtype] * 4, rtol=UNITS[dtype])
    assert torch.equal(ours[:, :3], wide[:, :3])
    assert torch.equal(ours[:, -4:], wide[:, -4:])
    assert torch.equal(ours[used < 0], wide[used < 0])


@pytest.mark.parametrize("dtype", list(UNITS))
def test_a_token_does_not_depend_on_the_others(level, dtype):
    torch.manual_seed(0)
    tokens, inputs, outputs, rank, slots = 70, 67, 41, 13, 3
    x, base = torch.randn(tokens, inputs).to(dtype), torch.randn(tokens, outputs).to(dtype)
    a, b = torch.randn(slots, rank, inputs).to(dtype), torch.randn(slots, outputs, rank).to(dtype)
    used, scales = torch.randint(-1, slots, (tokens,)), torch.rand(slots)
    together = base.clone()
    native.lora_add(together, x, a, b, scales, plan_lora(used))
    for some in ([3], [69], list(range(0, tokens, 3)), torch.randperm(tokens).tolist()):
        alone = base[some].clone()
        native.lora_add(alone, x[some], a, b, scales, plan_lora(used[some]))
        assert torch.equal(alone, together[some])


def test_what_does_not_fit_is_refused_and_nothing_is_written():
    y, x = torch.ones(2, 4), torch.ones(2, 3)
    with pytest.raises(KernelInputError, match="plan"):
        native.lora_add(y, x, torch.ones(1, 2, 3), torch.ones(1, 4, 2), torch.ones(1), plan_lora(torch.tensor([0, 1])))
    with pytest.raises(KernelInputError, match="x"):
        native.lora_add(y, x, torch.ones(1, 2, 3), torch.ones(1, 4, 2), torch.ones(1), plan_lora(torch.tensor([0])))
    assert torch.equal(y, torch.ones(2, 4))
