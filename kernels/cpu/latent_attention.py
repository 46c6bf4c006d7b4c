"""Latent attention on the CPU by torch: decodes as padded batches of one query a row, other rows in tiles of queries.

All heads of a token read the same stored row, so they are the lines of one matrix product. Scores and softmax are
float32; the weights are rounded to the storage's dtype. Uses the groups of `attention.py`, whose padding never changes
a result and never names a block of another row.
Called through `kernels/ops.py`; knows only tensors. Legend: T tokens, R rows of a group, Q queries and S keys of a
padded row, h query heads, D stored width, V width of the latent, B blocks, L layers, P slots of a block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from penstock.kernels.cpu.attention import SCORE_ELEMENTS, AttentionGroup, groups_of, own_plan
from penstock.kernels.ragged import AttentionPlan


def latent_attention(
    q_THD: Tensor, kv_BLCHPD: Tensor, layer: int, plan: AttentionPlan, scale: float, value_dim: int
) -> Tensor:
    """See `ops.latent_attention`."""
    slots, dim = kv_BLCHPD.shape[4:]
    storage = kv_BLCHPD.view(-1, slots * dim)[layer:]
    out = torch.empty((*q_THD.shape[:2], value_dim), dtype=q_THD.dtype)
    for group in groups_of(kv_BLCHPD, own_plan(plan), 0):
        k_RSD = storage.index_select(0, group.gather).view(group.num_rows, group.num_keys, dim)
        q = q_THD[group.tokens] if group.padded is None else q_THD.index_select(0, group.padded)
        attend = _one_query if group.num_queries == 1 else _many_queries
        result = attend(q, k_RSD, group, scale, value_dim)
        out[group.tokens] = result if group.kept is None else result.index_select(0, group.kept)
    return out


def _one_query(q_RhD: Tensor, k_RSD: Tensor, group: AttentionGroup, scale: float, value_dim: int) -> Tensor:
    scores = torch.matmul(q_RhD.float() * scale, k_RSD.float().transpose(-1, -2))
    if group.mask is not None:
        scores.add_(group.mask[:, 0])  # [R, 1, S]
    return torch.matmul(torch.softmax(scores, dim=-1).to(k_RSD.dtype), k_RSD[..., :value_dim])


def _many_queries(q_NhD: Tensor, k_RSD: Tensor, group: AttentionGroup, scale: float, value_dim: int) -> Tensor:
    """Row by row in tiles of queries, so that the scores of a tile stay within SCORE_ELEMENTS; N = R Q."""
    rows, queries, (_, heads, dim) = group.num_rows, group.num_queries, q_NhD.shape
    q_RQhD = q_NhD.view(rows, queries, heads, dim)
    out = torch.empty(rows, queries, heads, value_dim, dtype=q_NhD.dtype)
    size = max(1, SCORE_ELEMENTS // (heads * group.num_keys))
    for row in range(rows):
        for begin in range(0, queries, size):
            end = min(begin + size, queries)
            reach = group.num_keys if group.mask is not None else end  # causal from position 0
            k_SD = k_RSD[row, :reach]
            scores = torch.matmul((q_RQhD[row, begin:end].float() * scale).view(-1, dim), k_SD.float().t())
            scores = scores.view(end - begin, heads, reach)
            if group.mask is None:
                hidden = torch.ones(end - begin, reach, dtype=torch.bool).triu_(begin + 1)
                scores.masked_fill_(hidden[:, None], -torch.inf)
            else:
                scores.add_(group.mask[row, 0, begin:end, None])
            weights = torch.softmax(scores, dim=-1).to(k_SD.dtype).view(-1, reach)
            out[row, begin:end] = torch.matmul(weights, k_SD[:, :value_dim]).view(end - begin, heads, value_dim)
    return out.view(rows * queries, heads, value_dim)
