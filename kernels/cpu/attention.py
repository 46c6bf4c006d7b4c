"""Paged attention on the CPU: rows of similar shape become one padded batch, gathered block by block.

A plan is made once per step and serves every layer. Rows with a single new token (decodes) are computed as two batched
products; rows with more go through torch's fused attention, without a mask where they start at position 0. That one
cannot cap scores: with a soft cap the products are written out, in tiles. A sliding window has a plan of its own, over
the blocks that it reaches.
Padding never changes a result: padded keys are masked, padded queries dropped, and a padded table entry names the row's
own first block, so no row ever reads a block of another.

Called through `kernels/ops.py`; knows only tensors. Legend: T tokens, R rows of a group, Q queries and S keys of a
padded row, G query heads of one kv head, H kv heads, D head dim, B blocks, L layers, C = 2 (key, value), P slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from penstock.kernels.cpu.attention_states import paged_attention_with_lse
from penstock.kernels.cpu.grouping import RowGroup, group_rows
from penstock.kernels.cpu.windows import windowed
from penstock.kernels.ragged import AttentionLimits, AttentionPlan, AttentionWorkspace, RaggedBatch

I64 = NDArray[np.int64]

# The written-out scores of one tile stay within this many float32 numbers.
SCORE_ELEMENTS = 1 << 20


@dataclass(frozen=True, slots=True, eq=False)
class AttentionGroup:
    """Rows of similar shape that are computed as one padded batch of R rows, Q queries and S keys each.

    `gather` lists the [C, R, H, S / P] storage rows (one row = P slots x D of one block, layer 0, key or value, head).
    `tokens` places the queries in the packed batch; with padding, `padded` [R * Q] picks the (repeated) query of every
    padded place and `kept` the places that are real, in the order of `tokens`.
    """

    num_rows: int
    num_queries: int
    num_keys: int
    gather: Tensor
    tokens: slice | Tensor
    mask: Tensor | None  # additive, broadcastable to [R, heads, Q, S]; None = causal from position 0
    padded: Tensor | None = None
    kept: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class GroupedPlan(AttentionPlan):
    """`groups` is filled while the step runs: the first layer with a given window plans it for the others."""

    write_rows: Tensor  # [T * C * H] storage rows of D numbers in layer 0 that receive the new keys and values
    groups: dict[int, tuple[AttentionGroup, ...]]  # by window, 0 = all


def attention_workspace(kv_BLCHPD: Tensor, limits: AttentionLimits) -> AttentionWorkspace:
    """See `ops.attention_workspace`; nothing here needs memory at fixed addresses."""
    return AttentionWorkspace(limits)


def plan_attention(kv_BLCHPD: Tensor, batch: RaggedBatch, workspace: AttentionWorkspace | None = None) -> GroupedPlan:
    """See `ops.plan_attention`. Groups are planned when the first layer asks, since only it knows its window."""
    return GroupedPlan(batch, _write_rows(batch, kv_BLCHPD.shape), {})


def own_plan(plan: AttentionPlan) -> GroupedPlan:
    """The plan as this backend made it. Raises TypeError for one of another backend."""
    if not isinstance(plan, GroupedPlan):
        raise TypeError(f"plan: {type(plan).__name__} was made by another backend than cpu")
    return plan


def groups_of(kv_BLCHPD: Tensor, plan: GroupedPlan, window: int) -> tuple[AttentionGroup, ...]:
    """The plan's groups for this window, made at the first call."""
    if window not in plan.groups:
        batch = windowed(plan.batch, window, kv_BLCHPD.shape[4]) if window else plan.batch
        if window and batch is plan.batch:  # nobody is longer than the window
            plan.groups[window] = groups_of(kv_BLCHPD, plan, 0)
        else:
            plan.groups[window] = _plan_groups(kv_BLCHPD, batch, window)
    return plan.groups[window]


def _plan_groups(kv_BLCHPD: Tensor, batch: RaggedBatch, window: int) -> tuple[AttentionGroup, ...]:
    _, _, parts, heads, _, dim = kv_BLCHPD.shape
    token_bytes = parts * heads * dim * kv_BLCHPD.element_size()
    shapes = group_rows(batch.starts, batch.counts, token_bytes, window)
    return tuple(_plan_group(kv_BLCHPD, batch, shape, window) for shape in shapes)


def _write_rows(batch: RaggedBatch, shape: torch.Size) -> Tensor:
    """[T * C * H] numbers of the D-wide storage rows of layer 0 that the new tokens' keys and values go to."""
    _, layers, parts, heads, slots, _ = shape
    counts = batch.counts
    row_of_token = np.repeat(np.arange(len(counts)), counts)
    positions = batch.starts[row_of_token] + np.arange(batch.num_tokens) - batch.offsets[row_of_token]
    blocks = batch.block_tables[row_of_token, positions // slots].astype(np.int64)
    first = blocks * (layers * parts * heads * slots) + positions % slots
    return torch.from_numpy((first[:, None] + np.arange(parts * heads, dtype=np.int64) * slots).reshape(-1))


def _plan_group(kv_BLCHPD: Tensor, batch: RaggedBatch, shape: RowGroup, window: int) -> AttentionGroup:
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
        mask=None if shape.causal else _mask(starts, counts, shape, width * slots, kv_BLCHPD.dtype, window),
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
    starts: NDArray[np.int32],
    counts: NDArray[np.int32],
    shape: RowGroup,
    num_keys: int,
    dtype: torch.dtype,
    window: int,
) -> Tensor:
    """Additive mask [R, 1, Q, S]; float32 where one query per row makes the scores float32."""
    last = (starts[:, None] + np.minimum(np.arange(shape.num_queries), counts[:, None] - 1))[:, None, :, None]
    keys = np.arange(num_keys)
    hidden = keys > last
    if window:
        hidden |= keys <= last - window
    return torch.zeros(hidden.shape, dtype=torch.float32 if shape.num_queries == 1 else dtype).masked_fill_(
        torch.from_numpy(hidden), -torch.inf
    )


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
    if kv_scales is not None:
        return paged_attention_with_lse(
            q_THD, kv_BLCHPD, layer, plan, scale, window=window, soft_cap=soft_cap, kv_scales=kv_scales
        )[0]
    _, _, parts, heads, slots, dim = kv_BLCHPD.shape
    storage = kv_BLCHPD.view(-1, slots * dim)[layer * parts * heads :]
    out = torch.empty(q_THD.shape, dtype=q_THD.dtype)
    for group in groups_of(kv_BLCHPD, own_plan(plan), window):
        both = storage.index_select(0, group.gather).view(2, group.num_rows, heads, group.num_keys, dim)
        q = q_THD[group.tokens] if group.padded is None else q_THD.index_select(0, group.padded)
        if group.num_queries == 1:
            result = _one_query(q, both[0], both[1], group, scale, soft_cap)
        elif soft_cap:
            result = _many_capped_queries(q, both[0], both[1], group, scale, soft_cap)
        else:
            result = _many_queries(q, both[0], both[1], group, scale)
        out[group.tokens] = result if group.kept is None else result.index_select(0, group.kept)
    return out


def _one_query(
    q_RhD: Tensor, k_RHSD: Tensor, v_RHSD: Tensor, group: AttentionGroup, scale: float, soft_cap: float
) -> Tensor:
    """Scores and softmax in float32; the weights are rounded to the value's dtype."""
    rows, heads, _, dim = k_RHSD.shape
    q_RHGD = (q_RhD.float() * scale).view(rows, heads, -1, dim)
    scores = torch.matmul(q_RHGD, k_RHSD.float().transpose(-1, -2))
    if soft_cap:
        _cap(scores, soft_cap)
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


def _many_capped_queries(
    q_tokens: Tensor, k_RHSD: Tensor, v_RHSD: Tensor, group: AttentionGroup, scale: float, soft_cap: float
) -> Tensor:
    """Row by row in tiles of queries, so that the float32 scores of a tile stay within SCORE_ELEMENTS."""
    rows, heads, _, dim = k_RHSD.shape
    queries, keys = group.num_queries, group.num_keys
    q_RHGQD = q_tokens.view(rows, queries, heads, -1, dim).permute(0, 2, 3, 1, 4)
    out = torch.empty_like(q_tokens)
    out_RHGQD = out.view(rows, queries, heads, -1, dim).permute(0, 2, 3, 1, 4)
    size = max(1, SCORE_ELEMENTS // (q_RHGQD.shape[1] * q_RHGQD.shape[2] * keys))
    for row in range(rows):
        for begin in range(0, queries, size):
            end = min(begin + size, queries)
            reach = keys if group.mask is not None else end  # causal from position 0: later keys matter to nobody
            k_HSD, v_HSD = k_RHSD[row, :, :reach], v_RHSD[row, :, :reach]
            q_HND = (q_RHGQD[row, :, :, begin:end].float() * scale).reshape(heads, -1, dim)
            scores = torch.matmul(q_HND, k_HSD.float().transpose(-1, -2))
            scores = _cap(scores, soft_cap).view(heads, -1, end - begin, reach)
            if group.mask is None:
                scores.masked_fill_(torch.ones(end - begin, reach, dtype=torch.bool).triu_(begin + 1), -torch.inf)
            else:
                scores.add_(group.mask[row, :, begin:end])
            weights = torch.softmax(scores, dim=-1).to(v_HSD.dtype).view(heads, -1, reach)
            tile = torch.matmul(weights, v_HSD)
            out_RHGQD[row, :, :, begin:end] = tile.view(heads, -1, end - begin, dim)
    return out


def _cap(scores: Tensor, soft_cap: float) -> Tensor:
    """In place."""
    return scores.div_(soft_cap).tanh_().mul_(soft_cap)
