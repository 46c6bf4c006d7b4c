"""Latent attention on the GPU: every stored row is read once for all the heads of a few tokens, as key and as value.

Called through `kernels/ops.py`; knows only tensors and plans. One kernel follows the items of the step's plan (see
`attention_plan.py`), decodes and tiles alike: lines of a program are (token, head), so that with many heads one token
fills several programs and with few heads several tokens share one. The latent part of a row is loaded once and meets
both products, the rotated part only the first. Partial states are merged as those of `attention.py`.
Legend: T tokens, Hq query heads, D stored width, V width of the latent (VP: the power of two above it), R = D - V (RP
likewise), B blocks, L layers, P slots of a block, BM lines of a program, BN keys of one turn of the loop.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from penstock.kernels import expect
from penstock.kernels.errors import KernelInputError
from penstock.kernels.gpu.aot import AotCase
from penstock.kernels.gpu.attention import merge_partials, own_plan
from penstock.kernels.gpu.attention_kernels import ITEM, finish
from penstock.kernels.gpu.attention_workspace import PreparedPlan
from penstock.kernels.gpu.tuning import config_for
from penstock.kernels.ragged import AttentionPlan

LEAST_DOT = 16  # the shortest side of a product


@triton.jit
def _turn(
    acc, total, peak, q_latent, q_turned, table, n, end, query_at, base, stride_b, stride_p, qk_scale,
    MASKED: tl.constexpr, BN: tl.constexpr, P: tl.constexpr, V: tl.constexpr, VP: tl.constexpr, R: tl.constexpr,
    RP: tl.constexpr,
):  # fmt: skip
    """One turn of the online softmax over keys n .. n + BN - 1; MASKED: those behind a query or from `end` on are out.

    In their place the last key of the chunk is read, so that nothing is read that is not the row's own.
    """
    keys = n + tl.arange(0, BN)
    near = keys
    if MASKED:
        near = tl.minimum(keys, end - 1)
    blocks = tl.load(table + near // P)
    places = base + blocks.to(tl.int64) * stride_b + (near % P).to(tl.int64) * stride_p
    v = tl.arange(0, VP)
    if V != VP:
        latent = tl.load(places[:, None] + v[None, :], mask=(v < V)[None, :], other=0.0)
    else:
        latent = tl.load(places[:, None] + v[None, :])
    scores = tl.dot(q_latent, tl.trans(latent), input_precision="ieee")
    if R > 0:
        r = tl.arange(0, RP)
        turned = tl.load(places[:, None] + (V + r)[None, :], mask=(r < R)[None, :], other=0.0)
        scores = tl.dot(q_turned, tl.trans(turned), scores, input_precision="ieee")
    scores = scores * qk_scale
    if MASKED:
        upto = tl.minimum(query_at, end - 1)
        scores = tl.where(keys[None, :] <= upto[:, None], scores, float("-inf"))
    highest = tl.maximum(peak, tl.max(scores, 1))
    # A line that has seen no key yet keeps weight 0 throughout, not NaN.
    shift = tl.where(highest == float("-inf"), 0.0, highest)
    weights = tl.exp2(scores - shift[:, None])
    decay = tl.exp2(peak - shift)
    total = total * decay + tl.sum(weights, 1)
    acc = tl.dot(weights.to(q_latent.dtype), latent, acc * decay[:, None], input_precision="ieee")
    return acc, total, highest


@triton.jit
def latent_kernel(
    q, kv, out, partial_o, partial_lse, counts, items, token_list, positions, tables, first, stride_b, stride_p,
    stride_qt, stride_qh, stride_ot, stride_oh, qk_scale, COUNT: tl.constexpr, HEADS: tl.constexpr, SUB: tl.constexpr,
    V: tl.constexpr, VP: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, P: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """BM lines (token, head) of one item against its chunk of keys. Grid: items x SUB, pieces of an item innermost.

    COUNT: where the number of valid items stands.
    """
    program = tl.program_id(0)
    number = program // SUB
    if number >= tl.load(counts + COUNT):
        return
    item = items + number * ITEM
    token_begin = tl.load(item)
    num_tokens = tl.load(item + 1)
    table = tables + tl.load(item + 2)
    begin = tl.load(item + 3)
    end = tl.load(item + 4)
    partial = tl.load(item + 5)
    lowest = tl.load(item + 6)
    line = (program % SUB) * BM + tl.arange(0, BM)
    slot = line // HEADS
    head = line % HEADS
    real = slot < num_tokens
    token = tl.load(token_list + token_begin + slot, mask=real, other=0)
    query_at = tl.load(positions + token, mask=real, other=0)
    q_at = q + token.to(tl.int64) * stride_qt + head.to(tl.int64) * stride_qh
    v = tl.arange(0, VP)
    r = tl.arange(0, RP)
    q_latent = tl.load(q_at[:, None] + v[None, :], mask=real[:, None] & (v < V)[None, :], other=0.0)
    q_turned = tl.load(q_at[:, None] + (V + r)[None, :], mask=real[:, None] & (r < R)[None, :], other=0.0)
    base = kv + first
    acc = tl.zeros([BM, VP], tl.float32)
    total = tl.zeros([BM], tl.float32)
    peak = tl.full([BM], float("-inf"), tl.float32)
    # Up to `whole` every query sees all keys and no mask is needed.
    whole = begin + tl.maximum(tl.minimum(end, lowest + 1) - begin, 0) // BN * BN
    for n in tl.range(begin, whole, BN):
        acc, total, peak = _turn(
            acc, total, peak, q_latent, q_turned, table, n, end, query_at, base, stride_b, stride_p, qk_scale,
            False, BN, P, V, VP, R, RP,
        )  # fmt: skip
    for n in tl.range(whole, end, BN):
        acc, total, peak = _turn(
            acc, total, peak, q_latent, q_turned, table, n, end, query_at, base, stride_b, stride_p, qk_scale,
            True, BN, P, V, VP, R, RP,
        )  # fmt: skip
    finish(
        acc, total, peak, 1.0, out, partial_lse, partial_o, partial_lse, partial, token, slot, head, real, stride_ot,
        stride_oh, HEADS, False, V, VP,
    )  # fmt: skip
    return


def latent_attention(
    q_THD: Tensor, kv_BLCHPD: Tensor, layer: int, plan: AttentionPlan, scale: float, value_dim: int
) -> Tensor:
    """See `ops.latent_attention`."""
    heads = q_THD.shape[1]
    prepared = own_plan(plan).for_heads(kv_BLCHPD, heads)
    if len(q_THD) > prepared.num_tokens or (len(q_THD) < prepared.num_tokens and not prepared.padded):
        raise KernelInputError("latent_attention", "q", f"{len(q_THD)} tokens; the plan has {prepared.num_tokens}")
    expect.dense_rows("latent_attention", "q", q_THD)
    expect.dense_rows("latent_attention", "kv", kv_BLCHPD)
    out = torch.empty((*q_THD.shape[:2], value_dim), dtype=q_THD.dtype, device=q_THD.device)
    tile_tokens = max(1, prepared.query_tile // heads)
    _launch(q_THD, kv_BLCHPD, layer, prepared, scale, out, prepared.decode_items, prepared.num_decode, 0, heads)
    lines = tile_tokens * heads
    _launch(q_THD, kv_BLCHPD, layer, prepared, scale, out, prepared.tile_items, prepared.num_tile, 1, lines)
    if prepared.num_merge:
        # The plan's room is for states as wide as a stored row; ours are narrower and lie close together.
        states = len(prepared.partial_lse)
        partial_o = prepared.partial_o.view(-1)[: states * heads * value_dim].view(states, heads, value_dim)
        merges = (prepared.merge_tokens, prepared.merge_indptr, prepared.merge_slots)
        merge_partials(out, None, partial_o, prepared.partial_lse, merges, prepared.num_merge, prepared.counts)
    return out


def _launch(
    q: Tensor,
    kv: Tensor,
    layer: int,
    plan: PreparedPlan,
    scale: float,
    out: Tensor,
    items: Tensor,
    num_items: int,
    count: int,
    lines: int,
) -> None:
    """`lines` of one item, which has at most so many; `count`: where the number of items stands on the device."""
    if not num_items:
        return
    heads, value_dim, slots = q.shape[1], out.shape[2], kv.shape[4]
    model = latent_model(heads, value_dim, kv.shape[5], slots)
    config = latent_config(lines, kv.shape[5], slots, kv.element_size())
    pieces = triton.cdiv(lines, config["BM"])
    latent_kernel[(num_items * pieces,)](
        q,
        kv,
        out,
        plan.partial_o,
        plan.partial_lse,
        plan.counts,
        items,
        plan.tokens,
        plan.positions,
        plan.tables,
        layer * kv.stride(1),
        kv.stride(0),
        kv.stride(4),
        q.stride(0),
        q.stride(1),
        out.stride(0),
        out.stride(1),
        scale * math.log2(math.e),
        COUNT=count,
        SUB=pieces,
        **model,
        **config,
    )


def latent_model(heads: int, value_dim: int, dim: int, slots: int) -> dict[str, int]:
    """The compile-time arguments that a model fixes."""
    rest = dim - value_dim
    wide, narrow = (max(LEAST_DOT, triton.next_power_of_2(size)) for size in (value_dim, max(rest, 1)))
    return {"HEADS": heads, "V": value_dim, "VP": wide, "R": rest, "RP": narrow, "P": slots}


def latent_config(lines: int, dim: int, slots: int, kv_bytes: int) -> dict[str, int]:
    """Lines and keys of a program, warps and stages: the tuned ones, or what registers and shared memory allow.

    By default the result of BM lines, V wide in float32, takes half of the registers, and two turns of keys lie beside
    the queries in shared memory; float32 products are not for tensor cores and take small turns.
    """
    if kv_bytes > 2:
        default = {"BM": 16, "BN": 16, "num_warps": 8, "num_stages": 1}
    elif lines <= 16:
        default = {"BM": 16, "BN": 32, "num_warps": 4, "num_stages": 2}
    else:
        default = {"BM": 32, "BN": 32, "num_warps": 8, "num_stages": 2}
    key = {"stored": dim, "lines": lines, "page": slots, "bytes": kv_bytes}
    return config_for("latent_attention", key, default)


def _case(heads: int, lines: int, stored: str = "*bf16") -> AotCase:
    config = latent_config(lines, 576, 16, 4 if stored == "*fp32" else 2)
    strides = ("first", "stride_b", "stride_p", "stride_qt", "stride_qh", "stride_ot", "stride_oh")
    signature = {
        **dict.fromkeys(("q", "kv", "out"), stored),
        **dict.fromkeys(("partial_o", "partial_lse"), "*fp32"),
        **dict.fromkeys(("counts", "items", "token_list", "positions", "tables"), "*i32"),
        **dict.fromkeys(strides, "i32"),
        "qk_scale": "fp32",
    }
    pieces = triton.cdiv(lines, config["BM"])
    blocks = {"COUNT": 0, "SUB": pieces, "BM": config["BM"], "BN": config["BN"]}
    pointers = tuple(name for name, kind in signature.items() if kind.startswith("*"))
    return AotCase(
        f"{stored[1:]}_576_heads{heads}_lines{lines}",
        latent_kernel,
        signature,
        {**latent_model(heads, 512, 576, 16), **blocks},
        config["num_warps"],
        config["num_stages"],
        (*pointers, *strides),
    )


AOT_CASES = (_case(16, 16), _case(16, 128), _case(128, 128), _case(16, 16, "*fp32"))
