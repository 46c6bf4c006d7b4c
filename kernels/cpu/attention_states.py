"""Attention on the CPU with its log-sum-exp, over numbers or 8-bit codes, and the merge of partial results.

Rows one at a time and queries in tiles, in float32: the plain way, for callers that need more than the result and for
storages that no fused path reads. Needs nothing of a plan but its batch, so any backend's plan will do.
Called through `kernels/ops.py` and by `attention.py`; knows only tensors. Legend: T tokens, Hq query heads, H kv heads,
G = Hq / H, D head dim, B blocks, L layers, C = 2 (key, value), P slots, S keys of a row or partial states, M merges.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from penstock.kernels import quantized_kv
from penstock.kernels.ragged import AttentionPlan

# The written-out scores of one tile stay within this many float32 numbers.
SCORE_ELEMENTS = 1 << 20


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
    batch, heads = plan.batch, kv_BLCHPD.shape[3]
    out = torch.empty(q_THD.shape, dtype=q_THD.dtype)
    lse = torch.empty(q_THD.shape[:2], dtype=torch.float32)
    for row in range(len(batch.starts)):
        begin, end, start = int(batch.offsets[row]), int(batch.offsets[row + 1]), int(batch.starts[row])
        if begin == end:
            continue
        first = max(0, start - window + 1) // kv_BLCHPD.shape[4] * kv_BLCHPD.shape[4] if window else 0
        k_HSD, v_HSD = _row(kv_BLCHPD, layer, batch.block_tables[row], first, start + end - begin, kv_scales)
        keys = first + torch.arange(k_HSD.shape[1])
        size = max(1, SCORE_ELEMENTS // (q_THD.shape[1] * len(keys)))
        for at in range(begin, end, size):
            upto = min(at + size, end)
            queries = start + torch.arange(at - begin, upto - begin)
            q_HGTD = q_THD[at:upto].float().view(upto - at, heads, -1, q_THD.shape[2]).permute(1, 2, 0, 3)
            scores = (scale * q_HGTD) @ k_HSD.unsqueeze(1).transpose(-1, -2)
            if soft_cap:
                scores = soft_cap * torch.tanh(scores / soft_cap)
            hidden = keys[None, :] > queries[:, None]
            if window:
                hidden |= keys[None, :] <= queries[:, None] - window
            scores.masked_fill_(hidden, float("-inf"))
            tile = torch.softmax(scores, dim=-1) @ v_HSD.unsqueeze(1)
            out[at:upto] = tile.permute(2, 0, 1, 3).reshape(upto - at, -1, q_THD.shape[2]).to(out.dtype)
            lse[at:upto] = torch.logsumexp(scores, dim=-1).permute(2, 0, 1).reshape(upto - at, -1)
    return out, lse


def _row(
    kv: Tensor, layer: int, table: np.ndarray[tuple[int, ...], np.dtype[np.int32]], first: int, length: int,
    kv_scales: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Keys and values [H, S, D] of positions `first` to `length` as float32."""
    heads, slots, dim = kv.shape[3:]
    blocks = torch.from_numpy(table[first // slots : -(-length // slots)].astype(np.int64))
    both = quantized_kv.decode(quantized_kv.bits(kv)[blocks, layer], torch.float32, kv)
    both = both.permute(1, 2, 0, 3, 4).reshape(2, heads, -1, dim)[:, :, : length - first]
    if kv_scales is not None:
        both = both * kv_scales[layer][:, :, None, None]
    return both[0], both[1]


def merge_states(o_SHD: Tensor, lse_SH: Tensor, merge_indptr: Tensor) -> tuple[Tensor, Tensor]:
    """See `ops.merge_states`; all merges at once, by segments."""
    counts = torch.diff(merge_indptr)
    rows, (_, heads, dim) = len(counts), o_SHD.shape
    merge = torch.repeat_interleave(torch.arange(rows), counts)
    used = slice(int(merge_indptr[0]), int(merge_indptr[-1]))
    lse = lse_SH[used].float()
    peak = torch.full((rows, heads), float("-inf")).scatter_reduce_(0, merge[:, None].expand_as(lse), lse, "amax")
    shift = peak.masked_fill(peak == float("-inf"), 0.0)
    weights = torch.exp(lse - shift[merge])
    total = torch.zeros(rows, heads).index_add_(0, merge, weights)
    parts = (weights[:, :, None] * o_SHD[used].float()).masked_fill((weights == 0)[:, :, None], 0.0)
    out = torch.zeros(rows, heads, dim).index_add_(0, merge, parts)
    out = out / total.masked_fill(total == 0, 1.0)[:, :, None]
    return out.to(o_SHD.dtype), shift + torch.log(total)
