"""Latent attention on the CPU by the tiles of `attention.cpp`: one stored row is key and, cut short, value.

The heads of a token share their keys, so they could all be lines of one tile; where they are many they are cut into
groups, each a "kv head" at the same address, for a decode of a single row to keep several threads busy. The cut depends
on the number of heads alone, so that a result does not depend on the batch.
Called through `kernels/ops.py`; knows only tensors. Legend: T tokens, Hq query heads, D stored width, V width of the
latent, B blocks, L layers, P slots of a block.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from penstock.kernels.errors import KernelInputError
from penstock.kernels.native.attention import Shape, own_plan, run_tiles
from penstock.kernels.ragged import AttentionPlan

# Heads of a group: enough to pay for putting the keys in order once more for each; half as many take a fifth longer.
_MOST_HEADS = 16


@functools.lru_cache(maxsize=64)
def heads_of_group(query_heads: int) -> int:
    """The largest divisor up to 16."""
    return next(size for size in range(min(_MOST_HEADS, query_heads), 0, -1) if query_heads % size == 0)


def latent_attention(
    q_THD: Tensor, kv_BLCHPD: Tensor, layer: int, plan: AttentionPlan, scale: float, value_dim: int
) -> Tensor:
    """See `ops.latent_attention`."""
    _, layers, _, _, slots, dim = kv_BLCHPD.shape
    tokens, query_heads, _ = q_THD.shape
    own = own_plan(plan)
    if not kv_BLCHPD.is_contiguous() or tokens != own.batch.num_tokens:
        raise KernelInputError(
            "latent_attention", "kv or q", f"kv not contiguous, or {tokens} tokens are not the plan's"
        )
    if q_THD.stride(2) != 1 or q_THD.stride(1) != dim:
        q_THD = q_THD.contiguous()
    group = heads_of_group(query_heads)
    out = torch.empty(tokens, query_heads, value_dim, dtype=q_THD.dtype)
    shape = Shape(
        q_stride=q_THD.stride(0),
        block_stride=layers * slots * dim,
        part_stride=0,
        head_stride=0,
        kv_heads=query_heads // group,
        group=group,
        slots=slots,
        dim=dim,
        value_dim=value_dim,
        scale=scale,
    )
    run_tiles(q_THD, kv_BLCHPD, layer * slots * dim, own, shape, out, None)
    return out
