"""Rows for paged attention (decode, prefill, shared prefix), writing KV, and moving blocks."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from penstock.kernels import dispatch, ops
from penstock.kernels.ragged import AttentionLimits, RaggedBatch

from . import peers, sol
from .correctness import Bound, attention_bound, elementwise_bound, exact_attention
from .problem import Inputs, Problem, Row, normal
from .shapes import ModelShape, Plan, Workload

CHECKED_ROWS, CHECKED_TOKENS = 4, 12


def rows(plan: Plan) -> Iterator[Row]:
    """All of them; the large model's shapes for every workload, the others' for decode."""
    for model in plan.models:
        for load in plan.decodes:
            make = functools.partial(_attention, model=model, load=load, slots=plan.slots)
            yield Row(f"decode {model.name} {load.name}", "paged_attention", make, "attention_decode")
    model = plan.models[min(1, len(plan.models) - 1)]
    for load in plan.prefills:
        make = functools.partial(_attention, model=model, load=load, slots=plan.slots)
        yield Row(f"prefill {model.name} {load.name}", "paged_attention", make, "attention_tile")
    for load in plan.shared:
        for sharing in (True, False):
            make = functools.partial(_attention, model=model, load=load, slots=plan.slots, sharing=sharing)
            name = f"{'shared' if sharing else 'unshared'} prefix {model.name} {load.name}"
            yield Row(name, "paged_attention", make, "attention_tile")
    for tokens in plan.tokens:
        at = {"model": model, "tokens": tokens, "slots": plan.slots}
        yield Row(f"write_kv {model.name} T{tokens}", "write_kv", functools.partial(_write_kv, **at))
        yield Row(f"copy_blocks {model.name} n{tokens}", "copy_blocks", functools.partial(_copy_blocks, **at))
        for op in ("gather_blocks", "scatter_blocks"):
            yield Row(f"{op} {model.name} n{tokens}", op, functools.partial(_move_blocks, **at, op=op))
        for norm in (True, False):
            make = functools.partial(_rotate_and_store, **at, norm=norm)
            name = f"rotate_and_store{' with norm' if norm else ''} {model.name} T{tokens}"
            yield Row(name, "rotate_and_store", make, "rotate_and_store")
    for dtype in (torch.float8_e4m3fn, torch.int8):
        load = plan.decodes[0]
        make = functools.partial(_coded_decode, model=model, load=load, slots=plan.slots, dtype=dtype)
        kind = str(dtype).removeprefix("torch.")
        yield Row(f"decode {kind} KV {model.name} {load.name}", "paged_attention", make, "attention_decode")


def ragged_batch(load: Workload, slots: int) -> tuple[RaggedBatch, int]:
    """The batch with shuffled blocks, and how many blocks there are."""
    width = -(-(load.stored + load.new) // slots)
    common = load.shared // slots
    order = np.random.default_rng(0).permutation(common + load.rows * (width - common)).astype(np.int32)
    own = order[common:].reshape(load.rows, width - common)
    tables = np.concatenate((np.broadcast_to(order[:common], (load.rows, common)), own), axis=1)
    offsets = np.arange(load.rows + 1, dtype=np.int32) * np.int32(load.new)
    starts = np.full(load.rows, load.stored, np.int32)
    return RaggedBatch(starts, offsets, np.ascontiguousarray(tables)), len(order)


def _attention(device: torch.device, model: ModelShape, load: Workload, slots: int, *, sharing: bool = True) -> Problem:
    batch, blocks = ragged_batch(load, slots)
    kv = _storage(device, blocks, model, slots)
    tokens, scale = batch.num_tokens, 1 / math.sqrt(model.dim)
    q = normal(device, tokens, model.heads, model.dim, seed=7)
    if sharing:
        plan = ops.plan_attention(kv, batch)
    else:
        limits = AttentionLimits(load.rows, tokens, load.stored + load.new, model.heads, shared_prefix=False)
        plan = ops.plan_attention(kv, batch, ops.attention_workspace(kv, limits))
    checked = checked_tokens(load)

    def truth(each: Inputs) -> Tensor:
        found = []
        for row, inside in checked:
            keys, values = row_kv(kv, batch, row, slots)
            index = torch.tensor(inside, device=device)
            chosen = each["q"][row * load.new + index]
            found.append(exact_attention(chosen, keys, values, load.stored + index, scale))
        return torch.cat(found)

    def select(result: Tensor) -> Tensor:
        return torch.cat([result[row * load.new + torch.tensor(inside, device=device)] for row, inside in checked])

    bound = attention_bound(float(kv[:, 0, 1].abs().max()), torch.bfloat16)
    cost = sol.attention([load.stored] * load.rows, [load.new] * load.rows, model.heads, model.kv_heads, model.dim)
    if load.shared and sharing:
        own = load.stored + load.new - load.shared
        cost = sol.shared_attention(load.rows, load.shared, own, model.heads, model.kv_heads, model.dim)
    others, absent = peers.attention(device, kv, batch, model, load, scale)
    return Problem(
        {"q": q, "kv": kv},
        ("q",),
        lambda each: ops.paged_attention(each["q"], each["kv"], 0, plan, scale),
        truth,
        lambda _: bound,
        cost,
        (tokens, model.heads, model.dim),
        torch.bfloat16,
        select,
        peers=others,
        absent=absent,
    )


def _storage(device: torch.device, blocks: int, model: ModelShape, slots: int) -> Tensor:
    """One layer's KV of `blocks` blocks, made in pieces: a whole one in float32 would not fit beside it."""
    kv = torch.empty(blocks, 1, 2, model.kv_heads, slots, model.dim, dtype=torch.bfloat16, device=device)
    for begin in range(0, blocks, 8192):
        piece = kv[begin : begin + 8192]
        piece.copy_(normal(device, *piece.shape, seed=begin))
    return kv


def row_kv(kv: Tensor, batch: RaggedBatch, row: int, slots: int) -> tuple[Tensor, Tensor]:
    """Keys and values [S, H, D] of one row; the same where one stored row is both."""
    length = int(batch.starts[row] + batch.counts[row])
    table = torch.from_numpy(batch.block_tables[row, : -(-length // slots)].astype(np.int64)).to(kv.device)
    both = kv[table, 0].permute(1, 0, 3, 2, 4).flatten(1, 2)[:, :length]
    return both[0], both[-1]


def checked_tokens(load: Workload) -> list[tuple[int, list[int]]]:
    """(row, tokens of it) to compare: first, last and some between, of a few rows."""
    some = sorted({round(each) for each in np.linspace(0, load.rows - 1, min(CHECKED_ROWS, load.rows))})
    inside = sorted({round(each) for each in np.linspace(0, load.new - 1, min(CHECKED_TOKENS, load.new))})
    return [(row, inside) for row in some]


def _write_kv(device: torch.device, model: ModelShape, tokens: int, slots: int) -> Problem:
    load = Workload("write", tokens, slots - 1, 1)
    batch, blocks = ragged_batch(load, slots)
    kv = torch.zeros(blocks, 1, 2, model.kv_heads, slots, model.dim, dtype=torch.bfloat16, device=device)
    plan = ops.plan_attention(kv, batch)
    table = torch.from_numpy(batch.block_tables[:, 0].astype(np.int64)).to(device)

    def call(each: Inputs) -> Tensor:
        ops.write_kv(each["kv"], 0, each["new"], plan)
        return each["kv"]

    size = tokens * 2 * model.kv_heads * model.dim * 2
    return Problem(
        {"kv": kv, "new": normal(device, tokens, 2, model.kv_heads, model.dim)},
        ("new",),
        call,
        lambda each: each["new"].double(),
        lambda _: Bound(0.0, 0.0),
        sol.Cost(0.0, size, size),
        tuple(kv.shape),
        torch.bfloat16,
        lambda whole: whole[table, 0, :, :, slots - 1],
    )


def _copy_blocks(device: torch.device, model: ModelShape, tokens: int, slots: int) -> Problem:
    kv = normal(device, 2 * tokens, 1, 2, model.kv_heads, slots, model.dim)
    order = torch.randperm(2 * tokens, generator=torch.Generator().manual_seed(0)).to(device)
    pairs = order.view(tokens, 2)

    def call(each: Inputs) -> Tensor:
        ops.copy_blocks(each["kv"], pairs)
        return each["kv"]

    size = kv[0].numel() * 2 * tokens
    return Problem(
        {"kv": kv},
        ("kv",),
        call,
        lambda each: each["kv"][pairs[:, 0]].double(),
        lambda _: Bound(0.0, 0.0),
        sol.Cost(0.0, size, size),
        tuple(kv.shape),
        torch.bfloat16,
        lambda whole: whole[pairs[:, 1]],
    )


def _move_blocks(device: torch.device, model: ModelShape, tokens: int, slots: int, op: str) -> Problem:
    kv = normal(device, 2 * tokens, 1, 2, model.kv_heads, slots, model.dim)
    staging = normal(device, tokens, *kv.shape[1:], seed=1)
    blocks = torch.randperm(2 * tokens, generator=torch.Generator().manual_seed(0))[:tokens].to(device)
    gathers = op == "gather_blocks"

    def call(each: Inputs) -> Tensor:
        getattr(ops, op)(each["kv"], blocks, each["staging"])
        return each["staging" if gathers else "kv"]

    size = staging.numel() * 2
    return Problem(
        {"kv": kv, "staging": staging},
        ("kv", "staging"),
        call,
        lambda each: each["kv"][blocks].double() if gathers else each["staging"].double(),
        lambda _: Bound(0.0, 0.0),
        sol.Cost(0.0, size, size),
        tuple((staging if gathers else kv).shape),
        torch.bfloat16,
        (lambda whole: whole) if gathers else (lambda whole: whole[blocks]),
    )


def _rotate_and_store(device: torch.device, model: ModelShape, tokens: int, slots: int, *, norm: bool) -> Problem:
    load, heads = Workload("rotate", tokens, slots - 1, 1), model.heads + 2 * model.kv_heads
    batch, blocks = ragged_batch(load, slots)
    kv = torch.zeros(blocks, 1, 2, model.kv_heads, slots, model.dim, dtype=torch.bfloat16, device=device)
    plan, turned = ops.plan_attention(kv, batch), heads - model.kv_heads
    weight = normal(device, turned, model.dim, seed=2, dtype=torch.float32) if norm else None
    angles = normal(device, tokens, model.dim // 2, seed=1, dtype=torch.float32)
    inputs = {"qkv": normal(device, tokens, heads, model.dim), "kv": kv, "cos": angles.cos(), "sin": angles.sin()}

    def call(each: Inputs) -> Tensor:
        queries = ops.rotate_and_store(each["qkv"], weight, 1e-6, each["cos"], each["sin"], each["kv"], 0, plan)
        table = torch.from_numpy(batch.block_tables[:, 0].astype(np.int64)).to(device)
        stored = each["kv"][table, 0, :, :, slots - 1].flatten(1, 2)
        return torch.cat((queries, stored), dim=1)

    def truth(each: Inputs) -> Tensor:
        whole = each["qkv"].double()
        first = whole[:, :turned]
        first = first if weight is None else dispatch.REFERENCE.rms_norm(first, weight.double(), 1e-6)
        first = dispatch.REFERENCE.rotary(first, each["cos"].double(), each["sin"].double())
        return torch.cat((first, whole[:, turned:]), dim=1)

    size = tokens * heads * model.dim * 2
    return Problem(
        inputs,
        ("qkv",),
        call,
        truth,
        lambda each: elementwise_bound(16 * float(each["qkv"].abs().max()) + 16, torch.bfloat16),
        sol.Cost(0.0, size + tokens * model.dim * 4, size),
        (tokens, heads, model.dim),
        torch.bfloat16,
    )


def _coded_decode(device: torch.device, model: ModelShape, load: Workload, slots: int, dtype: torch.dtype) -> Problem:
    batch, blocks = ragged_batch(load, slots)
    plain = _storage(device, blocks, model, slots)
    unit = 448.0 if dtype is torch.float8_e4m3fn else 127.0
    scales = torch.full((1, 2, model.kv_heads), 6.0 / unit, device=device)
    codes = torch.empty(plain.shape, dtype=dtype, device=device)
    for begin in range(0, blocks, 4096):
        coded = (plain[begin : begin + 4096].float() / scales[0, 0, 0]).clamp(-unit, unit)
        codes[begin : begin + 4096] = coded.round().to(dtype) if dtype is torch.int8 else coded.to(dtype)
    del plain
    plan, scale = ops.plan_attention(codes, batch), 1 / math.sqrt(model.dim)
    checked = [row for row, _ in checked_tokens(load)]

    def truth(each: Inputs) -> Tensor:
        found = []
        for row in checked:
            keys, values = (part.float() * scales[0, 0, 0] for part in row_kv(codes, batch, row, slots))
            position = torch.tensor([load.stored], device=device)
            found.append(exact_attention(each["q"][row : row + 1], keys, values, position, scale))
        return torch.cat(found)

    cost = sol.attention(
        [load.stored] * load.rows, [1] * load.rows, model.heads, model.kv_heads, model.dim, bytes_each=1
    )
    return Problem(
        {"q": normal(device, load.rows, model.heads, model.dim, seed=7)},
        ("q",),
        lambda each: ops.paged_attention(each["q"], codes, 0, plan, scale, kv_scales=scales),
        truth,
        lambda _: attention_bound(6.0, torch.bfloat16),
        cost,
        (load.rows, model.heads, model.dim),
        torch.bfloat16,
        lambda result: result[checked],
    )
