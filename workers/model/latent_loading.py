"""Reads the weights of latent attention: which tensors there are, how they are fused, and a rank's part of them.

Called by `loading.py` for the families that keep latent rows. A rank of a group takes the rows of its own heads from
the up-projections, and the down-projections whole. Raises ModelError naming file and tensor.
Legend: E hidden size, H query heads of the rank, Q query latent, R latent, N plain and D rotated numbers of a head,
V value size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from penstock.kernels import ops
from penstock.kernels.packing import PackedWeight
from penstock.workers.model.config import DecoderConfig
from penstock.workers.model.latent_attention import LatentProjections
from penstock.workers.model.latent_fields import LatentShape
from penstock.workers.model.weight_reader import Cut, WeightReader

QUERY, QUERY_DOWN, QUERY_UP = "q_proj", "q_a_proj", "q_b_proj"
ROW_DOWN, ROW_UP = "kv_a_proj_with_mqa", "kv_b_proj"


def num_latent_tensors(shape: LatentShape, with_bias: bool) -> int:
    """Tensors of one layer's attention before the output projection."""
    query = 1 if shape.query_rank is None else 3 + with_bias
    return query + 3 + with_bias


def load_latent(config: DecoderConfig, shape: LatentShape, reader: WeightReader, prefix: str) -> LatentProjections:
    """The projections of the layer whose names begin with `prefix`."""
    heads = Cut(config.num_heads, reader.shard.heads(config.num_heads))
    query_norm, query_up = None, None
    if shape.query_rank is not None:
        query_norm = reader.norm(f"{prefix}q_a_layernorm.weight", shape.query_rank, 0.0)
        up = {QUERY_UP: heads.heads(shape.query_dim)}
        query_up = reader.column_linear(prefix, up, shape.query_rank, with_bias=False)
    both_up = heads.heads(shape.plain_dim + shape.value_dim), Cut.whole(shape.kv_rank)
    up_HBR = reader.fused_parts({f"{prefix}{ROW_UP}.weight": both_up}).view(len(heads), -1, shape.kv_rank)
    return LatentProjections(
        shape=shape,
        down=_load_down(config, shape, reader, prefix, heads),
        query_norm=query_norm,
        query_up=query_up,
        latent_norm=reader.norm(f"{prefix}kv_a_layernorm.weight", shape.kv_rank, 0.0),
        # In memory of their own: batched products would copy anything else in every step.
        key_up=up_HBR[:, : shape.plain_dim].contiguous(),
        value_up=up_HBR[:, shape.plain_dim :].transpose(1, 2).contiguous(),
    )


def _load_down(
    config: DecoderConfig, shape: LatentShape, reader: WeightReader, prefix: str, heads: Cut
) -> PackedWeight:
    """Of query (its latent, or the rank's heads at once) and stored row. Queries made at once never have a bias."""
    row = Cut.whole(shape.stored_dim)
    if shape.query_rank is not None:
        outputs = {QUERY_DOWN: Cut.whole(shape.query_rank), ROW_DOWN: row}
        return reader.column_linear(prefix, outputs, config.hidden_size, config.qkv_bias)
    query, every = heads.heads(shape.query_dim), Cut.whole(config.hidden_size)
    weight = reader.fused_parts({f"{prefix}{QUERY}.weight": (query, every), f"{prefix}{ROW_DOWN}.weight": (row, every)})
    return ops.pack_weight(weight, _row_bias(reader, prefix, len(query), row) if config.qkv_bias else None)


def _row_bias(reader: WeightReader, prefix: str, queries: int, row: Cut) -> Tensor:
    return torch.cat((reader.empty(queries).zero_(), reader.fused_parts({f"{prefix}{ROW_DOWN}.bias": (row,)})))
