"""Rows for what multiplies matrices: linears in bf16 and quantised, experts, adapters."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from penstock.kernels import dispatch, ops, quantize
from penstock.kernels.packing import GROUP, QuantFormat, QuantizedWeight

from . import peers, sol
from .correctness import Bound, gemm_bound
from .problem import Inputs, Problem, Row, normal
from .shapes import ModelShape, Plan, projections

# The weights' bytes an element, scales included.
WEIGHT_BYTES = {
    QuantFormat.FP8_TENSOR: 1.0,
    QuantFormat.FP8_CHANNEL: 1.0,
    QuantFormat.FP8_BLOCK: 1.0,
    QuantFormat.INT8_CHANNEL: 1.0,
    QuantFormat.INT4_GROUP: 0.5 + 2 / GROUP,
}
LARGE = 8.0  # how far a standard normal number goes, generously


def rows(plan: Plan) -> Iterator[Row]:
    """bf16 for every model's smallest and every token count of the large one; formats on the large one's products."""
    dense = [model for model in plan.models if not model.experts]
    for model in dense:
        for name, (outputs, inputs) in projections(model).items():
            for tokens in plan.gemm_tokens if model is dense[-1] else plan.gemm_tokens[:2]:
                make = functools.partial(_linear, outputs=outputs, inputs=inputs, tokens=tokens)
                yield Row(f"linear bf16 {model.name} {name} m{tokens}", "linear", make, "linear")
    for name, (outputs, inputs) in projections(dense[-1]).items():
        for tokens in plan.gemm_tokens:
            for form in QuantFormat:
                if form in (QuantFormat.FP8_TENSOR, QuantFormat.INT8_CHANNEL) and name not in ("qkv", "down"):
                    continue
                make = functools.partial(_quantized, outputs=outputs, inputs=inputs, tokens=tokens, form=form)
                kernel = "int4_gemm" if form is QuantFormat.INT4_GROUP else f"gemm_{form.value}"
                title = f"linear {form.value} {dense[-1].name} {name} m{tokens}"
                yield Row(title, "quantized_linear", make, kernel)
    for model in plan.models:
        for tokens in plan.moe_tokens if model.experts else ():
            make = functools.partial(_experts, model=model, tokens=tokens)
            yield Row(f"fused_moe {model.name} T{tokens}", "fused_moe", make, "moe")
            make = functools.partial(_routing, model=model, tokens=tokens)
            yield Row(f"route_experts {model.name} T{tokens}", "route_experts", make)
    for tokens, adapters, rank in plan.lora:
        for name, (outputs, inputs) in list(projections(dense[-1]).items())[:3:2]:
            at = {"outputs": outputs, "inputs": inputs, "tokens": tokens, "adapters": adapters, "rank": rank}
            title = f"lora {dense[-1].name} {name} T{tokens} adapters{adapters} r{rank}"
            yield Row(title, "lora_add", functools.partial(_lora, **at), "lora")


def _linear(device: torch.device, outputs: int, inputs: int, tokens: int) -> Problem:
    weight = normal(device, outputs, inputs, seed=1)
    packed = ops.pack_weight(weight.clone())
    others, absent = peers.linear(device, weight)
    return Problem(
        {"x": normal(device, tokens, inputs), "weight": weight},
        ("x",),
        lambda each: ops.linear(each["x"], packed),
        lambda each: each["x"].double() @ weight.double().t(),
        lambda each: gemm_bound(inputs, float(each["x"].abs().max()), LARGE, torch.bfloat16),
        sol.gemm(tokens, outputs, inputs),
        (tokens, outputs),
        torch.bfloat16,
        peers=others,
        absent=absent,
    )


def _quantized(device: torch.device, outputs: int, inputs: int, tokens: int, form: QuantFormat) -> Problem:
    weight = ops.quantize_weight(normal(device, outputs, inputs, seed=1), form)
    others, absent = peers.quantized(device, weight, form)

    def bound(each: Inputs) -> Bound:
        exact = gemm_bound(inputs, float(each["x"].abs().max()), LARGE, torch.bfloat16)
        if form in (QuantFormat.INT4_GROUP, QuantFormat.INT8_CHANNEL):
            # int4: a weight code times its bfloat16 scale is rounded once more before the product.
            return Bound(exact.absolute + 2.0**-9 * inputs**0.5 * LARGE * float(each["x"].abs().max()), exact.relative)
        # Hopper adds products of 8 bits with some 14 bits before they reach float32.
        return Bound(4 * 2.0**-12 * inputs**0.5 * LARGE * float(each["x"].abs().max()), exact.relative)

    return Problem(
        {"x": normal(device, tokens, inputs)},
        ("x",),
        lambda each: ops.quantized_linear(each["x"], weight),
        lambda each: _dequantised(each["x"], weight),
        bound,
        sol.gemm(tokens, outputs, inputs, w_bytes=WEIGHT_BYTES[form]),
        (tokens, outputs),
        torch.bfloat16,
        speedup=1.0 if form is QuantFormat.INT4_GROUP else 2.0,
        peers=others,
        absent=absent,
    )


def _dequantised(x: Tensor, weight: QuantizedWeight) -> Tensor:
    """Float64 product of what the codes stand for, of the weight and of the activations."""
    values = x.double()
    if weight.format is not QuantFormat.INT4_GROUP:
        codes, scales = quantize.quantize_tokens(x, weight)
        per_input = scales.double()[:, None]
        if weight.format is QuantFormat.FP8_BLOCK:
            per_input = scales.double().repeat_interleave(GROUP, dim=1)[:, : weight.num_inputs]
        values = codes.to(torch.float32).double() * per_input
    return values @ quantize.decode_weight(weight, torch.float64).t()


def _experts(device: torch.device, model: ModelShape, tokens: int) -> Problem:
    shape = (model.experts, 2 * model.width, model.hidden)
    gate_up = normal(device, *shape, seed=1) / model.hidden**0.5
    down = normal(device, model.experts, model.hidden, model.width, seed=2) / model.width**0.5
    packed = ops.pack_experts(gate_up, down)
    logits = normal(device, tokens, model.experts, seed=3, dtype=torch.float32)
    weights, ids = _ordered(ops.route_experts(logits, model.chosen))
    hit = int(torch.unique(ids).numel())
    others, absent = peers.experts(device, gate_up, down, ids, weights)

    def truth(each: Inputs) -> Tensor:
        x = each["x"].double()
        found = torch.zeros_like(x)
        for expert in torch.unique(ids).tolist():
            token, place = torch.nonzero(ids == expert, as_tuple=True)
            gate, up = (x[token] @ gate_up[expert].double().t()).chunk(2, dim=-1)
            own = (torch.nn.functional.silu(gate) * up) @ down[expert].double().t()
            found.index_add_(0, token, own * weights[token, place, None].double())
        return found

    return Problem(
        {"x": normal(device, tokens, model.hidden)},
        ("x",),
        lambda each: ops.fused_moe(each["x"], packed, ids, weights),
        truth,
        # The hidden numbers and each expert's result are rounded to bfloat16 on the way.
        lambda each: Bound(4 * 2.0**-8 * float(each["x"].abs().max()) ** 2 + 1e-6, 2 * 2.0**-8),
        sol.moe(tokens, model.chosen, hit, model.hidden, model.width),
        (tokens, model.hidden),
        torch.bfloat16,
        kinds=("normal", "zeros"),
        peers=others,
        absent=absent,
    )


def _ordered(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """(weights, ids) of a routing, whichever comes first."""
    first, second = pair
    return (first, second) if first.is_floating_point() else (second, first)


def _routing(device: torch.device, model: ModelShape, tokens: int) -> Problem:
    def truth(each: Inputs) -> Tensor:
        weights, ids = _ordered(dispatch.REFERENCE.route_experts(each["logits"].double(), model.chosen))
        return torch.zeros(tokens, model.experts, dtype=torch.float64, device=device).scatter_(
            1, ids.long(), weights.double()
        )

    def call(each: Inputs) -> Tensor:
        weights, ids = _ordered(ops.route_experts(each["logits"], model.chosen))
        return torch.zeros(tokens, model.experts, device=device).scatter_(1, ids.long(), weights.float())

    return Problem(
        {"logits": normal(device, tokens, model.experts, seed=3, dtype=torch.float32)},
        ("logits",),
        call,
        truth,
        lambda _: Bound(1e-6, 1e-5),
        sol.Cost(0.0, 4.0 * tokens * model.experts, 12.0 * tokens * model.chosen),
        (tokens, model.experts),
        torch.float32,
        kinds=("normal",),
    )


def _lora(device: torch.device, outputs: int, inputs: int, tokens: int, adapters: int, rank: int) -> Problem:
    a = normal(device, adapters, rank, inputs, seed=1) / inputs**0.5
    b = normal(device, adapters, outputs, rank, seed=2) / rank**0.5
    scales = torch.ones(adapters, device=device)
    slots = torch.arange(tokens, device=device) % adapters
    plan = ops.plan_lora(slots)

    def call(each: Inputs) -> Tensor:
        ops.lora_add(each["y"], each["x"], a, b, scales, plan)
        return each["y"]

    def truth(each: Inputs) -> Tensor:
        found = each["y"].double()
        for slot in range(adapters):
            mine = slots == slot
            found[mine] += each["x"][mine].double() @ a[slot].double().t() @ b[slot].double().t()
        return found

    return Problem(
        {"y": normal(device, tokens, outputs, seed=4), "x": normal(device, tokens, inputs, seed=5)},
        ("x",),
        call,
        truth,
        # The product with A may be rounded to bfloat16 before that with B.
        lambda each: Bound(2 * 2.0**-8 * float(each["x"].abs().max()) + 1e-6, 2.0**-8),
        sol.lora(tokens, min(adapters, tokens), rank, inputs, outputs),
        (tokens, outputs),
        torch.bfloat16,
        peers=peers.lora(a, b, slots),
    )
