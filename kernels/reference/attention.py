"""Paged attention, one row and one head group at a time: the definition of truth, float64 capable.

Called through `kernels/ops.py`; knows only tensors. Legend: T tokens, G query heads of one kv head, H kv heads, D head
dim, B blocks, L layers, C = 2 (key, value), P slots of a block, S keys of one row or partial states.
"""

from __future__ import annotations

import torch
from torch import Tensor

from penstock.kernels import quantized_kv
from penstock.kernels.ragged import AttentionLimits, AttentionPlan, AttentionWorkspace, RaggedBatch


def attention_workspace(kv_BLCHPD: Tensor, limits: AttentionLimits) -> AttentionWorkspace:
    """See `ops.attention_workspace`; the reference needs no memory."""
    return AttentionWorkspace(limits)


def plan_attention(kv_BLCHPD: Tensor, batch: RaggedBatch, workspace: AttentionWorkspace | None = None) -> AttentionPlan:
    """See `ops.plan_attention`; the reference prepares nothing."""
    return AttentionPlan(batch)


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
    return paged_attention_with_lse(
        q_THD, kv_BLCHPD, layer, plan, scale, window=window, soft_cap=soft_cap, kv_scales=kv_scales
    )[0]


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
    """See `ops.paged_attention_with_lse`; float32 arithmetic at least, float64 for float64, and so its log-sum-exp."""
    batch, (_, _, _, heads, slots, dim) = plan.batch, kv_BLCHPD.shape
    dtype = torch.promote_types(q_THD.dtype, torch.float32)
    out = torch.empty_like(q_THD)
    lse = torch.empty(q_THD.shape[:2], dtype=dtype, device=q_THD.device)
    for row in range(len(batch.starts)):
        begin, end, start = int(batch.offsets[row]), int(batch.offsets[row + 1]), int(batch.starts[row])
        length = start + end - begin
        table = torch.from_numpy(batch.block_tables[row, : -(-length // slots)].astype("int64"))
        both = quantized_kv.decode(quantized_kv.bits(kv_BLCHPD)[table, layer], dtype, kv_BLCHPD)
        both = both.permute(1, 2, 0, 3, 4).reshape(2, heads, -1, dim)[:, :, :length]
        if kv_scales is not None:
            both = both * kv_scales[layer].to(dtype)[:, :, None, None]
        q_HGTD = q_THD[begin:end].to(dtype).view(end - begin, heads, q_THD.shape[1] // heads, dim)
        q_HGTD = q_HGTD.permute(1, 2, 0, 3)
        scores = scale * q_HGTD @ both[0].unsqueeze(1).transpose(-1, -2)
        if soft_cap:
            scores = soft_cap * torch.tanh(scores / soft_cap)
        scores = scores.masked_fill(~_allowed(start, end - begin, window).to(scores.device), float("-inf"))
        weights = torch.softmax(scores, dim=-1)
        out[begin:end] = (
            (weights @ both[1].unsqueeze(1)).permute(2, 0, 1, 3).reshape(out[begin:end].shape).to(out.dtype)
        )
        lse[begin:end] = torch.logsumexp(scores, dim=-1).permute(2, 0, 1).reshape(lse[begin:end].shape)
    return out, lse


def _allowed(start: int, count: int, window: int) -> Tensor:
    """[T, S] bool: which keys each of the row's new tokens attends to."""
    keys, queries = torch.arange(start + count)[None, :], start + torch.arange(count)[:, None]
    allowed = keys <= queries
    return allowed & (keys > queries - window) if window else allowed


def merge_states(o_SHD: Tensor, lse_SH: Tensor, merge_indptr: Tensor) -> tuple[Tensor, Tensor]:
    """See `ops.merge_states`; one merge at a time."""
    rows = len(merge_indptr) - 1
    dtype = torch.promote_types(o_SHD.dtype, torch.float32)
    out = torch.zeros((rows, *o_SHD.shape[1:]), dtype=o_SHD.dtype)
    lse = torch.full((rows, lse_SH.shape[1]), float("-inf"), dtype=torch.promote_types(lse_SH.dtype, torch.float32))
    for row in range(rows):
        states = slice(int(merge_indptr[row]), int(merge_indptr[row + 1]))
        for head in range(lse_SH.shape[1]):
            s = lse_SH[states, head].to(dtype)
            some = s != float("-inf")
            if bool(some.any()):
                out[row, head] = (torch.softmax(s[some], 0) @ o_SHD[states, head][some].to(dtype)).to(out.dtype)
                lse[row, head] = torch.logsumexp(s[some], 0)
    return out, lse
