"""Writing and copying KV blocks, one token and one block at a time; the definition of both.

Called through `kernels/ops.py`; knows only tensors. Legend: B blocks, L layers, C = 2 (key, value), H kv heads,
P slots of a block, D head dim, T tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from penstock.kernels.ragged import AttentionPlan


def write_kv(kv_BLCHPD: Tensor, layer: int, new_TCHD: Tensor, plan: AttentionPlan) -> None:
    """See `ops.write_kv`."""
    batch, slots = plan.batch, kv_BLCHPD.shape[4]
    finite = torch.nan_to_num(new_TCHD)
    for row in range(len(batch.starts)):
        for token in range(int(batch.offsets[row]), int(batch.offsets[row + 1])):
            position = int(batch.starts[row]) + token - int(batch.offsets[row])
            block = int(batch.block_tables[row, position // slots])
            kv_BLCHPD[block, layer, :, :, position % slots] = finite[token]


def copy_blocks(kv_BLCHPD: Tensor, pairs: Tensor) -> None:
    """See `ops.copy_blocks`."""
    sources = [kv_BLCHPD[int(source)].clone() for source in pairs[:, 0]]
    for data, target in zip(sources, pairs[:, 1], strict=True):
        kv_BLCHPD[int(target)] = data
