"""Writing and copying KV blocks on the CPU: one indexed copy per layer and per step.

Called through `kernels/ops.py`; knows only tensors. Legend: B blocks, L layers, C = 2 (key, value), H kv heads,
P slots of a block, D head dim, T tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from penstock.kernels.cpu.attention import own_plan
from penstock.kernels.ragged import AttentionPlan


def write_kv(kv_BLCHPD: Tensor, layer: int, new_TCHD: Tensor, plan: AttentionPlan) -> None:
    """See `ops.write_kv`. The plan's rows are those of layer 0; a shifted view serves the other layers."""
    _, _, parts, heads, slots, dim = kv_BLCHPD.shape
    rows = kv_BLCHPD.view(-1, dim)[layer * parts * heads * slots :]
    rows.index_copy_(0, own_plan(plan).write_rows, torch.nan_to_num(new_TCHD).view(-1, dim))


def copy_blocks(kv_BLCHPD: Tensor, pairs: Tensor) -> None:
    """See `ops.copy_blocks`."""
    blocks = kv_BLCHPD.view(kv_BLCHPD.shape[0], -1)
    blocks.index_copy_(0, pairs[:, 1], blocks.index_select(0, pairs[:, 0]))
