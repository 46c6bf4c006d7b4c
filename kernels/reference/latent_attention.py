"""Latent attention, one row at a time: the definition of truth, float64 capable.

Called through `kernels/ops.py`; knows only tensors. Legend: T tokens, Hq query heads, D stored width, V width of the
latent, B blocks, L layers, P slots of a block, S keys of one row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from penstock.kernels.ragged import AttentionPlan


def latent_attention(
    q_THD: Tensor, kv_BLCHPD: Tensor, layer: int, plan: AttentionPlan, scale: float, value_dim: int
) -> Tensor:
    """See `ops.latent_attention`; float32 arithmetic at least, float64 for float64."""
    batch, slots, dim = plan.batch, kv_BLCHPD.shape[4], kv_BLCHPD.shape[5]
    dtype = torch.promote_types(q_THD.dtype, torch.float32)
    out = torch.empty((*q_THD.shape[:2], value_dim), dtype=q_THD.dtype, device=q_THD.device)
    for row in range(len(batch.starts)):
        begin, end, start = int(batch.offsets[row]), int(batch.offsets[row + 1]), int(batch.starts[row])
        length = start + end - begin
        table = torch.from_numpy(batch.block_tables[row, : -(-length // slots)].astype("int64"))
        k_SD = kv_BLCHPD[table, layer].reshape(-1, dim)[:length].to(dtype)
        scores = scale * q_THD[begin:end].to(dtype).transpose(0, 1) @ k_SD.t()
        queries, keys = start + torch.arange(end - begin), torch.arange(length)
        scores = scores.masked_fill((keys[None, :] > queries[:, None]).to(scores.device), float("-inf"))
        out[begin:end] = (torch.softmax(scores, dim=-1) @ k_SD[:, :value_dim]).transpose(0, 1).to(out.dtype)
    return out
