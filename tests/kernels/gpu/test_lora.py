"""Multi-adapter updates in Triton, by tiles and by tokens, against float64; neighbours, far rows, captured plans."""

import pytest
import torch

pytest.importorskip("triton")

from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.kernels.errors import KernelInputError
from penstock.kernels.gpu import lora
from penstock.kernels.reference import lora as reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROUNDING = {torch.float32: 2**-23, torch.bfloat16: 2**-8, torch.float16: 2**-10}


def exact_update(y, x, a, b, scales, slots):
    out = y.double()
    doubles = [each.double() for each in (x, a, b, scales)]
    reference.lora_add(out, *doubles, reference.plan_lora(slots, DEVICE))
    return out


@given(
    tokens=st.sampled_from([0, 1, 7, 16, 65]),
    shape=st.sampled_from([(5, 9), (64, 24), (130, 7), (1100, 140)]),
    rank=st.sampled_from([1, 8, 12, 40, 64]),
    slots=st.sampled_from([1, 3, 20]),
    dtype=st.sampled_from(list(ROUNDING)),
    per_token=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=12, deadline=None)
def test_against_float64(tokens, shape, rank, slots, dtype, per_token, seed):
    torch.manual_seed(seed)
    inputs, outputs = shape
    used = torch.randint(-1, slots, (tokens,))
    x, a, b = torch.randn(tokens, inputs), torch.randn(slots, rank, inputs), torch.randn(slots, outputs, rank)
    x, a, b = (each.to(DEVICE).to(dtype) for each in (x, a, b))
    scales = torch.rand(slots, device=DEVICE)
    storage = torch.randn(tokens, outputs + 5, device=DEVICE).to(dtype)
    before = storage.clone()
    y = storage[:, 2:-3]
    expected = exact_update(y, x, a, b, scales, used)
    lora.lora_add(y, x, a, b, scales, lora.plan_lora(used, DEVICE, per_token))
    most = (x.abs().amax() if tokens else 0) * a.abs().amax().double() * b.abs().amax().double()
    bound = ROUNDING[dtype] * expected.abs() + inputs * rank * 2**-23 * most
    assert ((y.double() - expected).abs() <= bound).all()
    idle = used.to(DEVICE) < 0
    assert torch.equal(storage[idle], before[idle])
    assert torch.equal(storage[:, :2], before[:, :2])
    assert torch.equal(storage[:, -3:], before[:, -3:])


@pytest.mark.parametrize("per_token", [False, True])
def test_a_token_does_not_depend_on_its_neighbours(per_token):
    torch.manual_seed(0)
    x, a = torch.randn(20, 300, device=DEVICE), torch.randn(3, 8, 300, device=DEVICE)
    b, scales = torch.randn(3, 24, 8, device=DEVICE), torch.ones(3, device=DEVICE)
    used = torch.randint(-1, 3, (20,))
    together = torch.zeros(20, 24, device=DEVICE)
    lora.lora_add(together, x, a, b, scales, lora.plan_lora(used, DEVICE, per_token))
    for some in ([0], [3, 19, 7]):
        alone = torch.zeros(len(some), 24, device=DEVICE)
        lora.lora_add(alone, x[some], a, b, scales, lora.plan_lora(used[some], DEVICE, per_token))
        assert torch.equal(alone, together[some])


@pytest.mark.parametrize("per_token", [False, True])
def test_a_plan_can_be_given_the_next_step(per_token):
    torch.manual_seed(0)
    x, a = torch.randn(6, 16, device=DEVICE), torch.randn(3, 8, 16, device=DEVICE)
    b, scales = torch.randn(3, 10, 8, device=DEVICE), torch.ones(3, device=DEVICE)
    kept = lora.plan_lora(torch.tensor([-1, -1, -1, -1, -1, -1]), DEVICE, per_token)
    memory = kept.table.data_ptr()
    following = torch.tensor([2, 0, -1, 2, 1, 2])
    kept.overwrite(lora.plan_lora(following, DEVICE, per_token))
    y = torch.zeros(6, 10, device=DEVICE)
    expected = exact_update(y, x, a, b, scales, following)
    lora.lora_add(y, x, a, b, scales, kept)
    assert kept.table.data_ptr() == memory
    assert torch.allclose(y.double(), expected, atol=1e-4)
    with pytest.raises(KernelInputError, match="plan_lora: plan"):
        kept.overwrite(lora.plan_lora(following[:5], DEVICE, per_token))


def sparse(numbers):
    """That many bfloat16 numbers, of which only the pages that are touched take memory on a CPU."""
    try:
        return torch.empty(numbers, dtype=torch.bfloat16, device=DEVICE)
    except RuntimeError as error:
        pytest.skip(f"no address space for it: {error}")


@pytest.mark.parametrize("per_token", [False, True])
def test_adapters_far_apart_in_memory(per_token):
    # A layer's slice of storage for all layers: the stride fits 32 bits, the offset of slot 2 does not.
    a = torch.as_strided(sparse((3 << 30) + 256), (3, 8, 16), (3 << 29, 16, 1), 64)
    a.copy_(torch.randn(3, 8, 16))
    x, b = torch.randn(3, 16, device=DEVICE).bfloat16(), torch.randn(3, 8, 8, device=DEVICE).bfloat16()
    scales, used = torch.ones(3, device=DEVICE), torch.tensor([2, 0, 2])
    y = torch.zeros(3, 8, dtype=torch.bfloat16, device=DEVICE)
    expected = exact_update(y, x, a, b, scales, used)
    lora.lora_add(y, x, a, b, scales, lora.plan_lora(used, DEVICE, per_token))
    assert ((y.double() - expected).abs() <= 2**-8 * expected.abs() + 1e-3).all()


def test_a_slot_beyond_the_weights_is_told():
    x, y = torch.randn(2, 16, device=DEVICE), torch.zeros(2, 4, device=DEVICE)
    a, b, scales = torch.randn(1, 8, 16), torch.randn(1, 4, 8), torch.ones(1)
    plan = lora.plan_lora(torch.tensor([0, 3]), DEVICE)
    with pytest.raises(KernelInputError, match="lora_add: plan: uses slot 3"):
        lora.lora_add(y, x, a.to(DEVICE), b.to(DEVICE), scales.to(DEVICE), plan)
