"""The two products of a mixture of experts on the GPU, over blocks of rows of one expert each, and the closing sum.

Launched by `moe`. The first product gathers its tokens and ends in the gated activation; the second one is scaled by
the routing weight; terms are kept in float32 and summed per token in the order of its choices, so that no result
depends on timing or on other tokens. Blocks that are not needed end at once.
Legend: R = T * k rows, E experts, K inputs, F width of one expert, B blocks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from penstock.kernels.gpu.aot import AotCase
from penstock.kernels.gpu.matrix_tiles import dot, tile_of
from penstock.kernels.gpu.moe_alignment import ExpertBlocks

_SUM_BLOCK = 512


@triton.jit
def gated(gate, up, GELU: tl.constexpr):
    """silu(gate) * up, or gelu(gate) * up in its tanh form, which is a sigmoid."""
    if GELU:
        inner = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
        return gate / (1.0 + tl.exp(-inner)) * up
    else:
        return gate / (1.0 + tl.exp(-gate)) * up


@triton.jit(do_not_specialize=["B"])
def gate_up_kernel(
    x,
    w,
    hidden,
    order,
    experts,
    starts,
    counts,
    B,
    K,
    F,
    CHOSEN: tl.constexpr,
    stride_x,
    BLOCK_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_T: tl.constexpr,
    EVEN_K: tl.constexpr,
    GELU: tl.constexpr,
):
    """hidden[place, f] = act(x[t] . w[e, f]) * (x[t] . w[e, F + f]), t the token of the row at that place."""
    pid_m, block = tile_of(tl.program_id(0), tl.cdiv(F, BLOCK_M), B, GROUP_T)
    count = tl.load(counts + block)
    if count == 0:
        return
    expert = tl.load(experts + block).to(tl.int64)
    place = tl.load(starts + block) + tl.arange(0, BLOCK_T)
    in_t = tl.arange(0, BLOCK_T) < count
    token = tl.load(order + place, mask=in_t, other=0) // CHOSEN
    f = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    in_f = f < F
    k = tl.arange(0, BLOCK_K)
    gate_tile = w + expert * 2 * F * K + f.to(tl.int64)[:, None] * K + k[None, :]
    up_tile = gate_tile + tl.cast(F, tl.int64) * K
    x_tile = x + token.to(tl.int64)[None, :] * stride_x + k[:, None]
    gate = tl.zeros((BLOCK_M, BLOCK_T), dtype=tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_T), dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        in_w, in_x = in_f[:, None], in_t[None, :]
        if not EVEN_K:
            in_w, in_x = in_w & (k[None, :] < K - start), in_x & (k[:, None] < K - start)
        right = tl.load(x_tile + start, mask=in_x, other=0.0)
        gate = dot(tl.load(gate_tile + start, mask=in_w, other=0.0), right, gate)
        up = dot(tl.load(up_tile + start, mask=in_w, other=0.0), right, up)
    out = hidden + place.to(tl.int64)[None, :] * F + f[:, None]
    tl.store(out, gated(gate, up, GELU).to(hidden.dtype.element_ty), mask=in_f[:, None] & in_t[None, :])


@triton.jit(do_not_specialize=["B"])
def down_kernel(
    hidden,
    w,
    weights,
    terms,
    order,
    experts,
    starts,
    counts,
    B,
    F,
    K,
    BLOCK_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_T: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """terms[row, k] = weights[row] * (hidden[place] . w[e, k]), row the one at that place."""
    pid_m, block = tile_of(tl.program_id(0), tl.cdiv(K, BLOCK_M), B, GROUP_T)
    count = tl.load(counts + block)
    if count == 0:
        return
    expert = tl.load(experts + block).to(tl.int64)
    place = tl.load(starts + block) + tl.arange(0, BLOCK_T)
    in_t = tl.arange(0, BLOCK_T) < count
    row = tl.load(order + place, mask=in_t, other=0).to(tl.int64)
    m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    in_m = m < K
    f = tl.arange(0, BLOCK_K)
    w_tile = w + expert * K * F + m.to(tl.int64)[:, None] * F + f[None, :]
    h_tile = hidden + place.to(tl.int64)[None, :] * F + f[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_T), dtype=tl.float32)
    for start in range(0, F, BLOCK_K):
        in_w, in_h = in_m[:, None], in_t[None, :]
        if not EVEN_K:
            in_w, in_h = in_w & (f[None, :] < F - start), in_h & (f[:, None] < F - start)
        left = tl.load(w_tile + start, mask=in_w, other=0.0)
        acc = dot(left, tl.load(h_tile + start, mask=in_h, other=0.0), acc)
    acc *= tl.load(weights + row, mask=in_t, other=0.0).to(tl.float32)[None, :]
    tl.store(terms + row[None, :] * K + m[:, None], acc, mask=in_m[:, None] & in_t[None, :])


@triton.jit
def sum_terms_kernel(terms, ids, out, E, K, CHOSEN: tl.constexpr, BLOCK: tl.constexpr):
    """out[t] = sum over j, first to last, of terms[t * k + j], of the choices that are experts."""
    t = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), dtype=tl.float32)
    for j in tl.static_range(CHOSEN):
        expert = tl.load(ids + t * CHOSEN + j)
        fine = (expert >= 0) & (expert < E)
        acc += tl.load(terms + (t * CHOSEN + j) * K + k, mask=(k < K) & fine, other=0.0)
    tl.store(out + t * K + k, acc.to(out.dtype.element_ty), mask=k < K)


def gate_up(x: Tensor, w: Tensor, blocks: ExpertBlocks, chosen: int, gelu: bool, config: Mapping[str, int]) -> Tensor:
    """Hidden [R, F] in the order of places, from x [T, K], rows dense, and w [E, 2 F, K]."""
    _, double, inputs = w.shape
    bound, width = len(blocks.counts), double // 2
    hidden = torch.empty(len(blocks.order), width, device=x.device, dtype=x.dtype)
    gate_up_kernel[(bound * triton.cdiv(width, config["BLOCK_M"]),)](
        x,
        w,
        hidden,
        blocks.order,
        blocks.experts,
        blocks.starts,
        blocks.counts,
        bound,
        inputs,
        width,
        chosen,
        x.stride(0),
        **_tiles(config),
        EVEN_K=inputs % config["BLOCK_K"] == 0,
        GELU=gelu,
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
    )
    return hidden


def down(hidden: Tensor, w: Tensor, weights: Tensor, blocks: ExpertBlocks, config: Mapping[str, int]) -> Tensor:
    """Terms [R, K], float32, in the order of rows, from hidden [R, F], w [E, K, F] and weights [T, k]."""
    _, outputs, width = w.shape
    bound = len(blocks.counts)
    terms = torch.empty(len(blocks.order), outputs, device=hidden.device, dtype=torch.float32)
    down_kernel[(bound * triton.cdiv(outputs, config["BLOCK_M"]),)](
        hidden,
        w,
        weights,
        terms,
        blocks.order,
        blocks.experts,
        blocks.starts,
        blocks.counts,
        bound,
        width,
        outputs,
        **_tiles(config),
        EVEN_K=width % config["BLOCK_K"] == 0,
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
    )
    return terms


def sum_terms(terms: Tensor, ids: Tensor, out: Tensor, num_experts: int) -> None:
    """Fill `out` [T, K], contiguous, from terms [R, K] and ids [T, k]."""
    tokens, outputs = out.shape
    grid = (tokens, triton.cdiv(outputs, _SUM_BLOCK))
    sum_terms_kernel[grid](terms, ids, out, num_experts, outputs, CHOSEN=ids.shape[1], BLOCK=_SUM_BLOCK, num_warps=4)


def _tiles(config: Mapping[str, int]) -> dict[str, int]:
    return {name: config[name] for name in ("BLOCK_T", "BLOCK_M", "BLOCK_K", "GROUP_T")}


def default_config(rows: int, experts: int, itemsize: int) -> dict[str, int]:
    """Tile sizes by the rows that an expert gets on average; the same blocks serve both products."""
    if itemsize == 4:
        sizes = {"BLOCK_T": 16, "BLOCK_M": 32, "BLOCK_K": 32, "GROUP_T": 8}
        return {**sizes, "num_warps": 4, "num_stages": 2}
    share = rows / experts
    block_t = next((size for size in (16, 32, 64) if share <= size), 128)
    sizes = {"BLOCK_T": block_t, "BLOCK_M": 64, "BLOCK_K": 128 if block_t <= 32 else 64, "GROUP_T": 8}
    return {**sizes, "num_warps": 4 if block_t < 128 else 8, "num_stages": 3 if block_t <= 32 else 4}


def _cases() -> tuple[AotCase, ...]:
    blocks = dict.fromkeys(("order", "experts", "starts", "counts"), "*i32")
    cases = []
    for element, size, shares in (("bf16", 2, (16, 32, 64, 256)), ("fp32", 4, (16,))):
        kind = f"*{element}"
        for share in shares:
            config = default_config(share, 1, size)
            options = (config["num_warps"], config["num_stages"])
            first = {"x": kind, "w": kind, "hidden": kind, **blocks, "B": "i32", "K": "i32", "F": "i32"}
            second = {"hidden": kind, "w": kind, "weights": "*fp32", "terms": "*fp32", **blocks}
            tiles = {**_tiles(config), "EVEN_K": True}
            name = f"{element}-t{config['BLOCK_T']}"
            up = (*first, "stride_x")
            cases += [
                AotCase(
                    f"gate-up-{name}",
                    gate_up_kernel,
                    {**first, "stride_x": "i32"},
                    {**tiles, "CHOSEN": 8, "GELU": False},
                    *options,
                    tuple(argument for argument in up if argument != "B"),
                ),
                AotCase(
                    f"down-{name}",
                    down_kernel,
                    {**second, "B": "i32", "F": "i32", "K": "i32"},
                    tiles,
                    *options,
                    (*second, "F", "K"),
                ),
            ]
    gelu = {**cases[0].constexprs, "GELU": True, "EVEN_K": False}
    cases.append(dataclasses.replace(cases[0], name="gate-up-bf16-gelu-ragged", constexprs=gelu))
    added = {"terms": "*fp32", "ids": "*i32", "out": "*bf16", "E": "i32", "K": "i32"}
    sums = AotCase("sum", sum_terms_kernel, added, {"CHOSEN": 8, "BLOCK": _SUM_BLOCK}, 4, 3, tuple(added))
    return (*cases, sums)


AOT_CASES = _cases()
