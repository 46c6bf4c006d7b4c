"""Paged attention, one row and one head group at a time: the definition of truth, float64 capable.

Called through `kernels/ops.py`; knows only tensors. Legend: T tokens, G query heads of one kv head, H kv heads, D head
dim, B blocks, L layers, C = 2 (key, value), P slots of a block, S keys of one row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from penstock.kernels.ragged import AttentionPlan, RaggedBatch


def plan_attention(kv_BLCHPD: Tensor, batch: RaggedBatch) -> AttentionPlan:
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
) -> Tensor:
    """See `ops.paged_attention`; float32 arithmetic at least, float64 for float64."""
    batch, (_, _, _, heads, slots, dim) = plan.batch, kv_BLCHPD.shape
    dtype = torch.promote_types(q_THD.dtype, torch.float32)
    out = torch.empty_like(q_THD)
    for row in range(len(batch.starts)):
        begin, end, start = int(batch.offsets[row]), int(batch.offsets[row + 1]), int(batch.starts[row])
        length = start + end - begin
        table = torch.from_numpy(batch.block_tables[row, : -(-length // slots)].astype("int64"))
        both = kv_BLCHPD[table, layer].to(dtype).permute(1, 2, 0, 3, 4).reshape(2, heads, -1, dim)[:, :, :length]
        q_HGTD = q_THD[begin:end].to(dtype).view(end - begin, heads, -1, dim).permute(1, 2, 0, 3)
        scores = scale * q_HGTD @ both[0].unsqueeze(1).transpose(-1, -2)
        if soft_cap:
            scores = soft_cap * torch.tanh(scores / soft_cap)
        weights = torch.softmax(scores.masked_fill(~_allowed(start, end - begin, window), float("-inf")), dim=-1)
        out[begin:end] = (
            (weights @ both[1].unsqueeze(1)).permute(2, 0, 1, 3).reshape(end - begin, -1, dim).to(out.dtype)
        )
    return out


def _allowed(start: int, count: int, window: int) -> Tensor:
    """[T, S] bool: which keys each of the row's new tokens attends to."""
    keys, queries = torch.arange(start + count)[None, :], start + torch.arange(count)[:, None]
    allowed = keys <= queries
    return allowed & (keys > queries - window) if window else allowed
