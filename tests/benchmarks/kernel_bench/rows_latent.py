"""Rows for latent attention: decodes and prefills at the public sizes of DeepSeek's models."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from penstock.kernels import ops

from . import sol
from .correctness import attention_bound, exact_attention
from .problem import Inputs, Problem, Row, normal
from .rows_attention import checked_tokens, ragged_batch, row_kv
from .shapes import LatentShape, Plan, Workload


def rows(plan: Plan) -> Iterator[Row]:
    """Every decode for every model; the shortest prefill for each."""
    for model in plan.latents:
        for load, kind in (*((each, "decode") for each in plan.decodes), (plan.prefills[0], "prefill")):
            make = functools.partial(_latent, model=model, load=load, slots=plan.slots)
            yield Row(f"latent {kind} {model.name} {load.name}", "latent_attention", make, "latent_attention")


def _latent(device: torch.device, model: LatentShape, load: Workload, slots: int) -> Problem:
    batch, blocks = ragged_batch(load, slots)
    kv = torch.empty(blocks, 1, 1, 1, slots, model.stored, dtype=torch.bfloat16, device=device)
    for begin in range(0, blocks, 8192):  # a whole one in float32 would not fit beside it
        piece = kv[begin : begin + 8192]
        piece.copy_(normal(device, *piece.shape, seed=begin))
    tokens, scale, plan = batch.num_tokens, model.stored**-0.5, ops.plan_attention(kv, batch)
    checked = checked_tokens(load)

    def truth(each: Inputs) -> Tensor:
        found = []
        for row, inside in checked:
            keys = row_kv(kv, batch, row, slots)[0]
            index = torch.tensor(inside, device=device)
            chosen = each["q"][row * load.new + index]
            values = keys[..., : model.value]
            found.append(exact_attention(chosen, keys, values, load.stored + index, scale))
        return torch.cat(found)

    def select(result: Tensor) -> Tensor:
        return torch.cat([result[row * load.new + torch.tensor(inside, device=device)] for row, inside in checked])

    bound = attention_bound(float(kv[..., : model.value].abs().max()), torch.bfloat16)
    return Problem(
        {"q": normal(device, tokens, model.heads, model.stored, seed=7), "kv": kv},
        ("q",),
        lambda each: ops.latent_attention(each["q"], each["kv"], 0, plan, scale, model.value),
        truth,
        lambda _: bound,
        sol.latent_attention(load.rows, load.stored, load.new, (model.heads, model.stored, model.value)),
        (tokens, model.heads, model.value),
        torch.bfloat16,
        select,
    )
