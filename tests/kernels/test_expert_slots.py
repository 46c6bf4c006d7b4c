"""Experts in and out of packed weights, for every backend's packing."""

import pytest
import torch

from penstock.kernels.cpu import moe as cpu
from penstock.kernels.errors import KernelInputError
from penstock.kernels.expert_slots import add_places, put_expert, take_expert
from penstock.kernels.native import moe as native
from penstock.kernels.native.library import function
from penstock.kernels.reference import moe as reference

BACKENDS = [cpu, reference]
try:
    function("moe", torch.float32)
    BACKENDS.append(native)
except (OSError, RuntimeError):  # no compiler here
    pass


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.__name__.split(".")[-2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("width", "inputs"), [(24, 16), (70, 96), (5, 7), (5, 6)])
def test_what_is_taken_is_what_was_packed(backend, dtype, width, inputs):
    gate_up = torch.randn(3, 2 * width, inputs).to(dtype)
    down = torch.randn(3, inputs, width).to(dtype)
    packed = backend.pack_experts(gate_up.clone(), down.clone())
    for expert in range(3):
        first, second = take_expert(packed, expert)
        assert torch.equal(first, gate_up[expert])
        assert torch.equal(second, down[expert])
    fresh = backend.pack_experts(gate_up[2:].clone(), down[2:].clone())
    wider = put_expert(add_places(packed, 2), 4, fresh)
    assert wider.num_experts == 5
    assert torch.equal(take_expert(wider, 4)[0], gate_up[2])
    assert torch.equal(take_expert(wider, 1)[1], down[1])
    x = torch.randn(5, inputs).to(dtype)
    ones = torch.ones(5, 1)
    there = backend.fused_moe(x, wider, torch.full((5, 1), 4), ones)
    assert torch.equal(there, backend.fused_moe(x, fresh, torch.zeros(5, 1, dtype=torch.int64), ones))


def test_what_does_not_fit_is_refused():
    packed = cpu.pack_experts(torch.randn(2, 8, 6), torch.randn(2, 6, 4))
    with pytest.raises(KernelInputError, match="take_expert: expert: 2; there are 2"):
        take_expert(packed, 2)
    for other in (
        cpu.pack_experts(torch.randn(2, 8, 6), torch.randn(2, 6, 4)),
        cpu.pack_experts(torch.randn(1, 10, 6), torch.randn(1, 6, 5)),
        reference.pack_experts(torch.randn(1, 8, 6), torch.randn(1, 6, 4)),
    ):
        with pytest.raises(KernelInputError, match="is not one expert of the same sizes and packing"):
            put_expert(packed, 0, other)
