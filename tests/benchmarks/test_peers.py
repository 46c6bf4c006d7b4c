"""What stands for the peers computes the same operation: on the CPU where torch has it there, with the truth beside."""

from types import SimpleNamespace

import pytest
import torch
from kernel_bench import peers, rows_attention, shapes

from penstock.kernels import dispatch, quantize
from penstock.kernels.packing import QuantFormat

CARD = SimpleNamespace(type="cuda")  # lets the calls be made; they run on the CPU's tensors


@pytest.mark.parametrize("load", [shapes.TOY.decodes[0], shapes.TOY.prefills[0]], ids=lambda load: load.name)
def test_attention_of_equal_rows_is_sdpa(load):
    model = shapes.TOY.models[0]
    problem = rows_attention._attention(torch.device("cpu"), model, load, shapes.TOY.slots)
    batch, _ = rows_attention.ragged_batch(load, shapes.TOY.slots)
    keys, values = peers._dense(problem.inputs["kv"], batch)
    found = peers._sdpa(problem.fresh(1), keys, values, load, model.dim**-0.5, "MATH")
    problem.check(found, 1)
    problem.check(problem.call(problem.fresh(1)), 1)


def test_grouped_products_are_a_mixture_of_experts():
    torch.manual_seed(0)
    gate_up, down = torch.randn(4, 32, 16).bfloat16() / 4, torch.randn(4, 16, 16).bfloat16() / 4
    x, ids, weights = torch.randn(6, 16).bfloat16(), torch.randint(0, 4, (6, 2)), torch.rand(6, 2)
    calls, absent = peers.experts(CARD, gate_up, down, ids, weights)
    if absent:
        pytest.skip(str(absent))
    exact = dispatch.REFERENCE.fused_moe(x, dispatch.REFERENCE.pack_experts(gate_up, down), ids, weights, "silu")
    torch.testing.assert_close(calls["grouped_mm"]({"x": x}), exact, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("form", [QuantFormat.FP8_TENSOR, QuantFormat.FP8_CHANNEL])
def test_scaled_mm_multiplies_the_same_codes(form):
    torch.manual_seed(0)
    weight = quantize.quantize_weight(torch.randn(32, 64), form, None, None)
    x = torch.randn(16, 64).bfloat16()
    calls, absent = peers.quantized(CARD, weight, form)
    assert absent == {}
    exact = dispatch.REFERENCE.quantized_linear(x, weight)
    for name in ("torch_quantize+scaled_mm", "scaled_mm"):
        torch.testing.assert_close(calls[name]({"x": x}), exact, atol=0.1, rtol=0.02)


def test_without_a_card_every_peer_says_why_it_is_absent():
    cpu = torch.device("cpu")
    for calls, absent in (
        peers.linear(cpu, torch.zeros(2, 2)),
        peers.experts(cpu, *[torch.zeros(1)] * 4),
        peers.quantized(cpu, None, QuantFormat.FP8_BLOCK),
    ):
        assert calls == {}
        assert set(absent.values()) == {peers.NOT_HERE}
    assert peers.lora(torch.zeros(1, 1, 1), torch.zeros(1, 1, 1), torch.zeros(1)) == {}
    assert {"torch", "triton", "flashinfer-python"} <= peers.versions().keys()
