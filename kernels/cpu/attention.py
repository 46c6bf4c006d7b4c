"""Paged attention on the CPU: rows of similar shape become one padded batch, gathered block by block.

A plan is made once per step and serves every layer. Rows with a single new token (decodes) are computed as two batched
products; rows with more go through torch's fused attention, without a mask where they start at position 0.
Padding never changes a result: padded keys are masked, padded queries dropped, and a padded table entry names the row's
own first block, so no row ever reads a block of another.

Called through `kernels/ops.py`; knows only tensors. Legend: T tokens, R rows of a group, Q queries and S keys of a
padded row, G query heads of one kv head, H kv heads, D head dim, B blocks, L layers, C = 2 (key, value), P slots.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from penstock.kernels.cpu.grouping import RowGroup, group_rows
from penstock.kernels.ragged import AttentionGroup, AttentionPlan, RaggedBatch

I64 = NDArray[np.int64]


def plan_attention(kv_BLCHPD: Tensor, batch: RaggedBatch) -> AttentionPlan:
    """See `ops.plan_attention`."""
    _, _, _, heads, _, dim = kv_BLCHPD.shape
    token_bytes = 2 * heads * dim * kv_BLCHPD.element_size()
    shapes = group_rows(batch.starts, batch.counts, token_bytes)
    groups = tuple(_plan_group(kv_BLCHPD, batch, shape) for shape in shapes)
    return AttentionPlan(batch, _write_rows(batch, kv_BLCHPD.shape), groups)


def _write_rows(batch: RaggedBatch, shape: torch.Size) -> Tensor:
    """[T * C * H] numbers of the D-wide storage rows of layer 0 that the new tokens' keys and values go to."""
    _, layers, parts, heads, slots, _ = shape
    counts = batch.counts
    row_of_token = np.repeat(np.arange(len(counts)), counts)
    positions = batch.starts[row_of_token] + np.arange(batch.num_tokens) - batch.offsets[row_of_token]
    blocks = batch.block_tables[row_of_token, positions // slots].astype(np.int64)
    first = blocks * (layers * parts * heads * slots) + positions % slots
    return torch.from_numpy((first[:, None] + np.arange(parts * heads, dtype=np.int64) * slots).reshape(-1))


def _plan_group(kv_BLCHPD: Tensor, batch: RaggedBatch, shape: RowGroup) -> AttentionGroup:
    rows, slots = shape.rows, kv_BLCHPD.shape[4]
    width = -(-shape.num_keys // slots)
    counts, starts = batch.counts[rows], batch.starts[rows]
    tokens, padded, kept = _place_queries(batch, rows, counts, shape.num_queries)
    return AttentionGroup(
        num_rows=len(rows),
        num_queries=shape.num_queries,
        num_keys=width * slots,
        gather=_gather_rows(batch.block_tables[rows, :width], starts + counts, kv_BLCHPD.shape),
        tokens=tokens,
        mask=None if shape.causal else _mask(starts, counts, shape.num_queries, width * slots, kv_BLCHPD.dtype),
        padded=padded,
        kept=kept,
    )


def _place_queries(
    batch: RaggedBatch, rows: I64, counts: NDArray[np.int32], num_queries: int
) -> tuple[slice | Tensor, Tensor | None, Tensor | None]:
    """(where the rows' tokens are, the query for every padded place, the places that are real)."""
    begins = batch.offsets[rows].astype(np.int64)
    consecutive = bool((np.diff(rows) == 1).all())
    steps = np.arange(num_queries)
    real = steps < counts[:, None]
    places = begins[:, None] + np.minimum(steps, counts[:, None] - 1)
    whole = slice(int(begins[0]), int(begins[-1]) + int(counts[-1]))
    tokens: slice | Tensor = whole if consecutive else torch.from_numpy(places[real])
    if real.all():
        return tokens, None, None
    return tokens, torch.from_numpy(places.reshape(-1)), torch.from_numpy(np.flatnonzero(real))


def _gather_rows(tables: NDArray[np.int32], lengths: NDArray[np.int32], shape: torch.Size) -> Tensor:
    """[C * R * H * W] numbers of the (P x D)-wide storage rows of layer 0."""
    _, layers, parts, heads, slots, _ = shape
    used = -(-lengths // slots)
    own = np.where(np.arange(tables.shape[1]) < used[:, None], tables, tables[:, :1]).astype(np.int64)
    first = own * (layers * parts * heads)
    offsets = np.arange(parts * heads, dtype=np.int64).reshape(parts, 1, heads, 1)
    return torch.from_numpy((first[None, :, None, :] + offsets).reshape(-1))


def _mask(
    starts: NDArray[np.int32], counts: NDArray[np.int32], num_queries: int, num_keys: int, dtype: torch.dtype
) -> Tensor:
    """Additive mask [R, 1, Q, S]; float32 where one query per row makes the scores float32."""
    last = starts[:, None] + np.minimum(np.arange(num_queries), counts[:, None] - 1)
    hidden = torch.from_numpy(np.arange(num_keys) > last[:, None, :, None])
    return torch.zeros(hidden.shape, dtype=torch.float32 if num_queries == 1 else dtype).masked_fill_(
        hidden, -torch.inf
    )


def paged_attention(q_THD: Tensor, kv_BLCHPD: Tensor, layer: int, plan: AttentionPlan, scale: float) -> Tensor:
    """See `ops.paged_attention`."""
    _, _, parts, heads, slots, dim = kv_BLCHPD.shape
    storage = kv_BLCHPD.view(-1, slots * dim)[layer * parts * heads :]
    out = torch.empty(q_THD.shape, dtype=q_THD.dtype)
    for group in plan.groups:
        both = storage.index_select(0, group.gather).view(2, group.num_rows, heads, group.num_keys, dim)
        q = q_THD[group.tokens] if group.padded is None else q_THD.index_select(0, group.padded)
        run = _one_query if group.num_queries == 1 else _many_queries
        result = run(q, both[0], both[1], group, scale)
        out[group.tokens] = result if group.kept is None else result.index_select(0, group.kept)
    return out


def _one_query(q_RhD: Tensor, k_RHSD: Tensor, v_RHSD: Tensor, group: AttentionGroup, scale: float) -> Tensor:
    """Scores and softmax in float32; the weights are rounded to the value's dtype."""
    rows, heads, _, dim = k_RHSD.shape
    q_RHGD = (q_RhD.float() * scale).view(rows, heads, -1, dim)
    scores = torch.matmul(q_RHGD, k_RHSD.float().transpose(-1, -2))
    if group.mask is not None:
        scores.add_(group.mask)
    weights = torch.softmax(scores, dim=-1).to(v_RHSD.dtype)
    return torch.matmul(weights, v_RHSD).view(q_RhD.shape)


def _many_queries(q_tokens: Tensor, k_RHSD: Tensor, v_RHSD: Tensor, group: AttentionGroup, scale: float) -> Tensor:
    rows, heads, _, dim = k_RHSD.shape
    q_RhQD = q_tokens.view(rows, group.num_queries, -1, dim).transpose(1, 2)
    grouped = q_RhQD.shape[1] != heads
    if group.mask is None:  # causal from position 0: keys beyond the last query are padding
        k_RHSD, v_RHSD = k_RHSD[:, :, : group.num_queries], v_RHSD[:, :, : group.num_queries]
    out = F.scaled_dot_product_attention(
        q_RhQD, k_RHSD, v_RHSD, attn_mask=group.mask, is_causal=group.mask is None, scale=scale, enable_gqa=grouped
    )
    return out.transpose(1, 2).reshape(q_tokens.shape)
