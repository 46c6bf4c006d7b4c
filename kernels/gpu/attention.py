"""Paged attention on the GPU: launches the kernels of `attention_kernels.py` with the plan of the step.

Called through `kernels/ops.py`; knows only tensors and plans. Rows with one new token go to the decode kernel, others
and shared prefixes to the tile kernel, tokens whose keys were cut into chunks to the merge kernel: three launches at
most for a layer. Legend: T tokens, Hq query heads, H kv heads, D head dim, B blocks, L layers, C = 2 (key, value),
P slots of a block, S partial states, M merged rows.
"""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from penstock.kernels import expect
from penstock.kernels.errors import KernelInputError
from penstock.kernels.gpu.attention_kernels import decode_kernel, merge_kernel, tile_kernel
from penstock.kernels.gpu.attention_workspace import (
    GpuPlan,
    GpuWorkspace,
    PreparedPlan,
    has_warpgroups,
    make_workspace,
    prepare_in,
    settings_for,
)
from penstock.kernels.gpu.kv_codes import E4M3, E4M3_UNIT, INT8, PLAIN
from penstock.kernels.gpu.tuning import config_for
from penstock.kernels.ragged import AttentionLimits, AttentionPlan, AttentionWorkspace, RaggedBatch

KINDS = {torch.float8_e4m3fn: E4M3, torch.int8: INT8}
UNITS = {PLAIN: 1.0, E4M3: E4M3_UNIT, INT8: 1.0}
MERGED_AT_ONCE = 16


def attention_workspace(kv_BLCHPD: Tensor, limits: AttentionLimits) -> AttentionWorkspace:
    """See `ops.attention_workspace`."""
    return make_workspace(kv_BLCHPD, limits)


def plan_attention(kv_BLCHPD: Tensor, batch: RaggedBatch, workspace: AttentionWorkspace | None = None) -> GpuPlan:
    """See `ops.plan_attention`."""
    if workspace is None:
        return GpuPlan(batch, settings_for(kv_BLCHPD.device, kv_BLCHPD.shape[-1]), {}, [])
    if not isinstance(workspace, GpuWorkspace):
        raise TypeError(f"workspace: {type(workspace).__name__} was made by another backend than gpu")
    prepared = {workspace.limits.query_heads: prepare_in(workspace, batch)}
    return GpuPlan(batch, workspace.settings, prepared, [])


def own_plan(plan: AttentionPlan) -> GpuPlan:
    """The plan as this backend made it. Raises TypeError for one of another backend."""
    if not isinstance(plan, GpuPlan):
        raise TypeError(f"plan: {type(plan).__name__} was made by another backend than gpu")
    return plan


def paged_attention(
    q_THD: Tensor,
    kv_BLCHPD: Tensor,
    layer: int,
    plan: AttentionPlan,
    scale: float,
    *,
    window: int = 0,
    soft_cap: float = 0.0,
    kv_scales: Tensor | None = None,
) -> Tensor:
    """See `ops.paged_attention`."""
    prepared = own_plan(plan).for_heads(kv_BLCHPD, q_THD.shape[1])
    return _attend(q_THD, kv_BLCHPD, layer, prepared, scale, window, soft_cap, kv_scales, None)


def paged_attention_with_lse(
    q_THD: Tensor,
    kv_BLCHPD: Tensor,
    layer: int,
    plan: AttentionPlan,
    scale: float,
    *,
    window: int = 0,
    soft_cap: float = 0.0,
    kv_scales: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `ops.paged_attention_with_lse`."""
    prepared = own_plan(plan).for_heads(kv_BLCHPD, q_THD.shape[1])
    lse = torch.empty(q_THD.shape[:2], dtype=torch.float32, device=q_THD.device)
    return _attend(q_THD, kv_BLCHPD, layer, prepared, scale, window, soft_cap, kv_scales, lse), lse


def _attend(
    q: Tensor,
    kv: Tensor,
    layer: int,
    plan: PreparedPlan,
    scale: float,
    window: int,
    soft_cap: float,
    kv_scales: Tensor | None,
    lse: Tensor | None,
) -> Tensor:
    if len(q) > plan.num_tokens or (len(q) < plan.num_tokens and not plan.padded):
        raise KernelInputError("paged_attention", "q", f"{len(q)} tokens; the plan has {plan.num_tokens}")
    _, _, _, heads, slots, dim = kv.shape
    expect.dense_rows("paged_attention", "q", q)
    expect.dense_rows("paged_attention", "kv", kv)
    group, kind = q.shape[1] // heads, KINDS.get(kv.dtype, PLAIN)
    codes = kv.view(torch.uint8) if kind == E4M3 else kv
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    scales = plan.partial_lse if kv_scales is None else kv_scales
    state = plan.partial_lse if lse is None else lse
    first = (q, codes, scales, out, state, plan.partial_o, plan.partial_lse, plan.counts)
    at = (layer * kv.stride(1), layer * kv.stride(1) + kv.stride(2), kv.stride(0), kv.stride(3), kv.stride(4))
    strides = (q.stride(0), q.stride(1), out.stride(0), out.stride(1))
    numbers = (layer * 2 * heads, _scale(scale, soft_cap), float(soft_cap), window)
    model = _model(heads, group, dim, slots, kind, bool(window), bool(soft_cap), lse is not None)
    if plan.num_decode:
        rows = max(16, triton.next_power_of_2(group))
        config = decode_config(dim, group, slots, kv.element_size())
        decode_kernel[(plan.num_decode * heads,)](
            *first, plan.decode_items, plan.tables, *at, *strides, *numbers, **model, BM=rows, **config
        )
    if plan.num_tile:
        config = tile_config(dim, plan.query_tile, slots, q.element_size(), kv.element_size(), has_warpgroups(q.device))
        lists = (plan.tile_items, plan.tokens, plan.positions, plan.tables)
        tile_kernel[(plan.num_tile * heads,)](
            *first, *lists, *at, *strides, *numbers, **model, BM=plan.query_tile, **config
        )
    if plan.num_merge:
        merges = (plan.merge_tokens, plan.merge_indptr, plan.merge_slots)
        merge_partials(out, lse, plan.partial_o, plan.partial_lse, merges, plan.num_merge, plan.counts)
    return out


def _scale(scale: float, soft_cap: float) -> float:
    """To base 2, or to units of the cap."""
    return scale / soft_cap if soft_cap else scale * math.log2(math.e)


def _model(
    heads: int, group: int, dim: int, slots: int, kind: int, windowed: bool, capped: bool, with_lse: bool
) -> dict[str, object]:
    """The compile-time arguments that both attention kernels share."""
    return {
        "H": heads,
        "G": group,
        "D": dim,
        "DP": max(16, triton.next_power_of_2(dim)),
        "P": slots,
        "WINDOWED": windowed,
        "CAPPED": capped,
        "HAS_LSE": with_lse,
        "KIND": kind,
        "UNIT": UNITS[kind],
    }


def merge_states(o_SHD: Tensor, lse_SH: Tensor, merge_indptr: Tensor) -> tuple[Tensor, Tensor]:
    """See `ops.merge_states`."""
    expect.dense_rows("merge_states", "o", o_SHD)
    rows = len(merge_indptr) - 1
    out = torch.empty((rows, *o_SHD.shape[1:]), dtype=o_SHD.dtype, device=o_SHD.device)
    lse = torch.empty((rows, o_SHD.shape[1]), dtype=torch.float32, device=o_SHD.device)
    if rows:
        indptr = merge_indptr.contiguous()
        merge_partials(out, lse, o_SHD.contiguous(), lse_SH.contiguous(), (indptr, indptr, indptr), rows, None)
    return out, lse


def merge_partials(
    out: Tensor,
    lse: Tensor | None,
    o: Tensor,
    states: Tensor,
    lists: tuple[Tensor, Tensor, Tensor],
    rows: int,
    counts: Tensor | None,
) -> None:
    """Merge partial states [S, Hq, D] and [S, Hq] into `out` and `lse`.

    `lists`: the tokens merged, where each one's states begin, the states; only the second is read without counts.
    """
    _, heads, dim = o.shape
    merge_kernel[(rows * heads,)](
        out,
        states if lse is None else lse,
        o,
        states,
        lists[0] if counts is None else counts,
        *lists,
        len(out),
        out.stride(0),
        out.stride(1),
        HEADS=heads,
        D=dim,
        DP=triton.next_power_of_2(dim),
        BS=MERGED_AT_ONCE,
        COUNTED=counts is not None,
        INDEXED=counts is not None,
        HAS_LSE=lse is not None,
        **merge_config(dim),
    )


def decode_config(dim: int, group: int, slots: int, kv_bytes: int) -> dict[str, int]:
    """Keys of a turn, warps and stages of the decode kernel: the tuned ones, or what fills the memory pipe.

    By default a turn reads about 32 KiB of keys and values. Of five stages three go to the block numbers that the
    loads wait for, so that two turns are under way, in each of two or three programs on a multiprocessor.
    """
    wide = max(16, triton.next_power_of_2(dim))
    default = {"BN": max(16, min(128, 16384 // (wide * max(kv_bytes, 2)))), "num_warps": 4, "num_stages": 5}
    return config_for("attention_decode", {"head_dim": dim, "group": group, "page": slots, "bytes": kv_bytes}, default)


def tile_config(
    dim: int, rows: int, slots: int, q_bytes: int, kv_bytes: int, warpgroups: bool = True
) -> dict[str, int]:
    """The same of the tile kernel: as much of keys and values as fits beside the queries and the registers."""
    wide = max(16, triton.next_power_of_2(dim))
    if q_bytes > 2:  # float32 products are not for tensor cores; small turns keep them in registers
        default = {"BN": 16, "num_warps": 8, "num_stages": 1}
    elif rows >= 64 and not warpgroups:
        default = {"BN": 32 if wide > 64 else 64, "num_warps": 8, "num_stages": 3 if wide <= 128 else 2}
    elif rows >= 128:
        narrow = wide > 64 or kv_bytes < 2
        default = {"BN": 32 if wide > 128 else 64 if narrow else 128, "num_warps": 8, "num_stages": 3}
    elif rows >= 64:
        default = {"BN": 32 if wide > 128 else 64, "num_warps": 4, "num_stages": 3}
    else:  # as the decode kernel
        default = {"BN": 32 if wide > 128 else 64, "num_warps": 4, "num_stages": 5}
    key = {"head_dim": dim, "rows": rows, "page": slots, "bytes": kv_bytes}
    return config_for("attention_tile", key, default)


def merge_config(dim: int) -> dict[str, int]:
    """Few numbers a program: one or two warps, four for latents."""
    warps = 1 if dim <= 128 else 2 if dim <= 256 else 4
    return config_for("attention_merge", {"head_dim": dim}, {"num_warps": warps, "num_stages": 1})
