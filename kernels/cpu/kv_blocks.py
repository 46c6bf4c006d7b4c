"""Writing and moving KV blocks on the CPU: one indexed copy per layer and per step.

Called through `kernels/ops.py`; knows only tensors. Legend: B blocks, L layers, C = 2 (key, value), H kv heads,
P slots of a block, D head dim, T tokens, n blocks moved.
"""

from __future__ import annotations

import torch
from torch import Tensor

from penstock.kernels import quantized_kv
from penstock.kernels.cpu.attention import own_plan
from penstock.kernels.ragged import AttentionPlan


def write_kv(
    kv_BLCHPD: Tensor, layer: int, new_TCHD: Tensor, plan: AttentionPlan, kv_scales: Tensor | None = None
) -> None:
    """See `ops.write_kv`. The plan's rows are those of layer 0; a shifted view serves the other layers."""
    _, _, parts, heads, slots, dim = kv_BLCHPD.shape
    rows = quantized_kv.bits(kv_BLCHPD).view(-1, dim)[layer * parts * heads * slots :]
    if kv_scales is None:
        stored = torch.nan_to_num(new_TCHD)
    else:
        stored = quantized_kv.bits(quantized_kv.encode(new_TCHD, kv_scales[layer], kv_BLCHPD.dtype))
    rows.index_copy_(0, own_plan(plan).write_rows, stored.view(-1, dim))


def copy_blocks(kv_BLCHPD: Tensor, pairs: Tensor) -> None:
    """See `ops.copy_blocks`."""
    blocks = quantized_kv.bits(kv_BLCHPD).view(kv_BLCHPD.shape[0], -1)
    blocks.index_copy_(0, pairs[:, 1], blocks.index_select(0, pairs[:, 0]))


def gather_blocks(kv_BLCHPD: Tensor, blocks: Tensor, staging_nLChPD: Tensor, first_head: int = 0) -> None:
    """See `ops.gather_blocks`."""
    staging = quantized_kv.bits(staging_nLChPD)
    part = quantized_kv.bits(kv_BLCHPD).narrow(3, first_head, staging.shape[3])
    torch.index_select(part, 0, blocks, out=staging)


def scatter_blocks(kv_BLCHPD: Tensor, blocks: Tensor, staging_nLChPD: Tensor, first_head: int = 0) -> None:
    """See `ops.scatter_blocks`."""
    staging = quantized_kv.bits(staging_nLChPD)
    quantized_kv.bits(kv_BLCHPD).narrow(3, first_head, staging.shape[3]).index_copy_(0, blocks, staging)
