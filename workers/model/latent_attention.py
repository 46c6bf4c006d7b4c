"""Attention of DeepSeek's families before the output projection: queries brought to the latent that a token keeps.

Called by `decoder.py`, layer by layer; `latent_loading.py` makes the weights. Each token keeps one row per layer, the
normalised latent and a rotated key that all heads share, instead of keys and values. The up-projections of keys and
values are not applied to stored rows: that of the keys meets the query, that of the values the result (DeepSeek-V2,
2024, section 2.1.2, "absorbed"); but for long chunks of prompts, where that costs more (`latent_prefill.py`). A rank of
a group has its own heads and the whole row. Knows no blocks' owners.
Legend: T packed tokens, E hidden size, H query heads, Q query latent, R latent, N plain and D rotated numbers of a
head, V value size; B blocks, L layers, C = 1 (the row), P slots of a block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from penstock.kernels import ops
from penstock.kernels.packing import PackedWeight
from penstock.kernels.ragged import AttentionPlan
from penstock.workers.model.latent_fields import NORM_EPS, LatentShape
from penstock.workers.model.latent_prefill import LatentPrefill
from penstock.workers.model.port import KVExchange


@dataclass(frozen=True, slots=True, eq=False)
class LatentProjections:
    """From hidden states to queries and stored rows, and from attended latents to values."""

    shape: LatentShape
    down: PackedWeight  # [Q + R + D, E]; without a query latent [H (N + D) + R + D, E]
    query_norm: Tensor | None  # [Q]
    query_up: PackedWeight | None  # [H (N + D), Q]
    latent_norm: Tensor  # [R]
    key_up: Tensor  # [H, N, R]
    value_up: Tensor  # [H, R, V]


def attend_latent(
    weights: LatentProjections,
    hidden_TE: Tensor,
    angles: tuple[Tensor, Tensor],
    kv_BLCHPD: Tensor,
    layer: int,
    plan: AttentionPlan,
    scale: float,
    exchange: KVExchange | None = None,
    prefill: LatentPrefill | None = None,
) -> Tensor:
    """Values of all heads side by side, [T, H V]; writes every token's row. `angles`: cosine and sine [T, D / 2]."""
    shape, tokens = weights.shape, len(hidden_TE)
    projected = ops.linear(hidden_TE, weights.down)
    queries = projected.shape[1] - shape.stored_dim
    query, latent = projected[:, :queries], projected[:, queries : queries + shape.kv_rank]
    key_TD = projected[:, queries + shape.kv_rank :]
    if weights.query_norm is not None and weights.query_up is not None:
        query = ops.linear(ops.rms_norm(query.contiguous(), weights.query_norm, NORM_EPS), weights.query_up)
    query_THq = query.reshape(tokens, len(weights.key_up), shape.query_dim)
    turned = torch.cat((query_THq[..., shape.plain_dim :], key_TD[:, None]), dim=1).float()
    turned = ops.rotary(turned, *angles, interleaved=shape.interleaved).to(hidden_TE.dtype)
    row = torch.cat((ops.rms_norm(latent.contiguous(), weights.latent_norm, NORM_EPS), turned[:, -1]), dim=1)
    ops.write_kv(kv_BLCHPD, layer, row[:, None, None], plan)
    if exchange is not None:
        exchange.share(kv_BLCHPD, layer)
    plain, rotated = query_THq[..., : shape.plain_dim], turned[:, :-1]
    if prefill is None:
        return _attend_absorbed(weights, plain, rotated, kv_BLCHPD, layer, plan, scale).flatten(1)
    values = plain.new_empty(tokens, len(weights.key_up), shape.value_dim)
    asking = torch.cat((plain[prefill.tokens], rotated[prefill.tokens]), dim=-1)
    values[prefill.tokens] = prefill.attend(asking, kv_BLCHPD, layer, weights.key_up, weights.value_up, scale)
    if prefill.others is not None:
        others = prefill.other_tokens
        values[others] = _attend_absorbed(
            weights, plain[others], rotated[others], kv_BLCHPD, layer, prefill.others, scale
        )
    return values.flatten(1)


def _attend_absorbed(
    weights: LatentProjections,
    plain_THN: Tensor,
    rotated_THD: Tensor,
    kv_BLCHPD: Tensor,
    layer: int,
    plan: AttentionPlan,
    scale: float,
) -> Tensor:
    """Values [T, H, V] of these queries, the plan's."""
    # Contiguous: batched products take strided rows one by one.
    brought_THR = torch.bmm(plain_THN.transpose(0, 1).contiguous(), weights.key_up).transpose(0, 1)
    brought = torch.cat((brought_THR, rotated_THD), dim=-1)
    attended_THR = ops.latent_attention(brought, kv_BLCHPD, layer, plan, scale, weights.shape.kv_rank)
    values_HTV = torch.bmm(attended_THR.transpose(0, 1).contiguous(), weights.value_up)
    return values_HTV.transpose(0, 1)
