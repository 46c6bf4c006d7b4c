"""Rows for what is bound by traffic alone: norms, rotations, activations, sampling."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from penstock.kernels import dispatch, ops

from . import sol
from .correctness import elementwise_bound
from .problem import Inputs, Problem, Row, normal
from .shapes import ModelShape, Plan

EPS = 1e-6


def rows(plan: Plan) -> Iterator[Row]:
    """All of them."""
    for model in plan.models:
        for tokens in plan.tokens:
            name = f"{model.name} T{tokens}"
            at = {"model": model, "tokens": tokens}
            yield Row(f"add_rms_norm {name}", "add_rms_norm", functools.partial(_add_rms_norm, **at), "rms_norm")
            yield Row(f"head_norm {name}", "rms_norm", functools.partial(_head_norm, **at), "rms_norm")
            yield Row(f"rotary {name}", "rotary", functools.partial(_rotary, **at), "rotary")
            yield Row(f"silu_and_mul {name}", "silu_and_mul", functools.partial(_gated, **at, kind="silu"), "gated")
    model, tokens = plan.models[0], plan.tokens[-1]
    for kind in ("gelu", "gelu_erf"):
        make = functools.partial(_gated, model=model, tokens=tokens, kind=kind)
        yield Row(f"{kind}_and_mul {model.name} T{tokens}", f"{kind}_and_mul", make, "gated")
    make = functools.partial(_rotary, model=model, tokens=tokens, interleaved=True)
    yield Row(f"rotary interleaved {model.name} T{tokens}", "rotary", make, "rotary")
    for count in plan.sampled_rows:
        for filters in ("plain", "top_k_top_p"):
            make = functools.partial(_sampling, vocab=model.vocab, count=count, filters=filters)
            yield Row(f"sample_tokens {filters} S{count}", "sample_tokens", make, "sample_tokens")
    for count in plan.tokens:
        yield Row(f"gumbel n{64 * count}", "gumbel", functools.partial(_gumbel, count=64 * count))
        yield Row(f"philox n{64 * count}", "philox", functools.partial(_philox, count=64 * count))


def _add_rms_norm(device: torch.device, model: ModelShape, tokens: int) -> Problem:
    weight = normal(device, model.hidden, seed=2)
    inputs = {
        "x": normal(device, tokens, model.hidden),
        "residual": normal(device, tokens, model.hidden, seed=1),
        "weight": weight,
    }

    def truth(each: Inputs) -> Tensor:
        return dispatch.REFERENCE.rms_norm((each["x"] + each["residual"]).double(), each["weight"].double(), EPS)

    return Problem(
        inputs,
        ("x",),
        lambda each: ops.add_rms_norm(each["x"], each["residual"], each["weight"], EPS)[0],
        truth,
        lambda each: elementwise_bound(8 * float(weight.abs().max()), torch.bfloat16),
        sol.rms_norm(tokens, model.hidden, residual=True),
        (tokens, model.hidden),
        torch.bfloat16,
    )


def _head_norm(device: torch.device, model: ModelShape, tokens: int) -> Problem:
    heads = model.heads + model.kv_heads
    inputs = {
        "x": normal(device, tokens, heads, model.dim),
        "weight": normal(device, heads, model.dim, seed=2, dtype=torch.float32),
    }
    return Problem(
        inputs,
        ("x",),
        lambda each: ops.rms_norm(each["x"], each["weight"], EPS),
        lambda each: dispatch.REFERENCE.rms_norm(each["x"].double(), each["weight"].double(), EPS),
        lambda each: elementwise_bound(8 * float(each["weight"].abs().max()), torch.bfloat16),
        sol.rms_norm(tokens * heads, model.dim, residual=False),
        (tokens, heads, model.dim),
        torch.bfloat16,
    )


def _rotary(device: torch.device, model: ModelShape, tokens: int, *, interleaved: bool = False) -> Problem:
    heads = model.heads + model.kv_heads
    angles = normal(device, tokens, model.dim // 2, seed=1, dtype=torch.float32)
    inputs = {"x": normal(device, tokens, heads, model.dim), "cos": angles.cos(), "sin": angles.sin()}

    def truth(each: Inputs) -> Tensor:
        x, cos, sin = (each[name].double() for name in ("x", "cos", "sin"))
        return dispatch.REFERENCE.rotary(x, cos, sin, interleaved=interleaved)

    return Problem(
        inputs,
        ("x",),
        lambda each: ops.rotary(each["x"], each["cos"], each["sin"], interleaved=interleaved),
        truth,
        lambda each: elementwise_bound(float(each["x"].abs().max()), torch.bfloat16),
        sol.rotary(tokens, heads, model.dim),
        (tokens, heads, model.dim),
        torch.bfloat16,
    )


def _gated(device: torch.device, model: ModelShape, tokens: int, kind: str) -> Problem:
    name = f"{kind}_and_mul"
    return Problem(
        {"x": normal(device, tokens, 2 * model.width)},
        ("x",),
        lambda each: getattr(ops, name)(each["x"]),
        lambda each: getattr(dispatch.REFERENCE, name)(each["x"].double()),
        lambda each: elementwise_bound(float(each["x"].abs().max()), torch.bfloat16),
        sol.gated(tokens, model.width),
        (tokens, model.width),
        torch.bfloat16,
    )


def _sampling(device: torch.device, vocab: int, count: int, filters: str) -> Problem:
    logits = 3 * normal(device, count, vocab, dtype=torch.float32)
    filtered = filters != "plain"
    numbers = torch.arange(count, device=device)
    columns = (
        torch.full((count,), 0.6 if filtered else 1.0, device=device),
        torch.full((count,), 20 if filtered else 0, device=device),
        torch.full((count,), 0.95 if filtered else 1.0, dtype=torch.float64, device=device),
        torch.zeros(count, device=device),
        numbers * 0x9E3779B97F4A7C15 % (1 << 62),
        numbers * 0,
        numbers + 100,
    )
    checked = min(count, 4)  # rows; the definition sorts and draws noise for whole rows in Python

    def truth(each: Inputs) -> Tensor:
        host = (column[:checked].cpu() for column in columns)
        return dispatch.CPU.sample_tokens(each["logits"][:checked].cpu(), *host).to(device)

    return Problem(
        {"logits": logits},
        ("logits",),
        lambda each: ops.sample_tokens(each["logits"], *columns),
        truth,
        lambda each: elementwise_bound(0.0, torch.float64),
        sol.sampling(count, vocab),
        (count,),
        torch.int64,
        select=lambda tokens: tokens[:checked],
        kinds=("normal",),
        peers={"torch.softmax+multinomial": _multinomial} if not filtered else {},
    )


def _multinomial(each: Inputs) -> Tensor:
    return torch.multinomial(torch.softmax(each["logits"], dim=-1), 1)


def _gumbel(device: torch.device, count: int) -> Problem:
    number = torch.arange(count, device=device)
    columns = (number * 0x9E3779B97F4A7C15 % (1 << 62), number % 4, number % 5000, number % 150_000)
    return Problem(
        {"seed": columns[0]},
        (),
        lambda each: ops.gumbel(each["seed"], *columns[1:]),
        lambda each: dispatch.REFERENCE.gumbel(each["seed"].cpu(), *(column.cpu() for column in columns[1:])).to(
            device
        ),
        lambda each: elementwise_bound(1e-8, torch.float64),
        sol.Cost(0.0, 32.0 * count, 8.0 * count),
        (count,),
        torch.float64,
        kinds=("normal",),
    )


def _philox(device: torch.device, count: int) -> Problem:
    counter = torch.arange(4 * count, device=device).view(count, 4) * 2654435761 % (1 << 32)
    key = torch.arange(2 * count, device=device).view(count, 2)
    return Problem(
        {"counter": counter},
        (),
        lambda each: ops.philox(each["counter"], key),
        lambda each: dispatch.REFERENCE.philox(each["counter"].cpu(), key.cpu()).to(device),
        lambda each: elementwise_bound(0.0, torch.float64),
        sol.Cost(0.0, 48.0 * count, 32.0 * count),
        (count, 4),
        torch.int64,
        kinds=("normal",),
    )
