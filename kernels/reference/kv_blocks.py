"""Writing, copying, gathering and scattering KV blocks, one token and one block at a time; the definition of each.

Called through `kernels/ops.py`; knows only tensors. Legend: B blocks, L layers, C = 2 (key, value), H kv heads,
P slots of a block, D head dim, T tokens, n blocks moved.
"""

from __future__ import annotations

import torch
from torch import Tensor

from penstock.kernels import quantized_kv
from penstock.kernels.ragged import AttentionPlan


def write_kv(
    kv_BLCHPD: Tensor, layer: int, new_TCHD: Tensor, plan: AttentionPlan, kv_scales: Tensor | None = None
) -> None:
    """See `ops.write_kv`."""
    batch, slots = plan.batch, kv_BLCHPD.shape[4]
    if kv_scales is None:
        stored = torch.nan_to_num(new_TCHD)
    else:
        stored = quantized_kv.bits(quantized_kv.encode(new_TCHD, kv_scales[layer], kv_BLCHPD.dtype))
    kv = quantized_kv.bits(kv_BLCHPD)
    for row in range(len(batch.starts)):
        for token in range(int(batch.offsets[row]), int(batch.offsets[row + 1])):
            position = int(batch.starts[row]) + token - int(batch.offsets[row])
            block = int(batch.block_tables[row, position // slots])
            kv[block, layer, :, :, position % slots] = stored[token]


def copy_blocks(kv_BLCHPD: Tensor, pairs: Tensor) -> None:
    """See `ops.copy_blocks`."""
    kv = quantized_kv.bits(kv_BLCHPD)
    sources = [kv[int(source)].clone() for source in pairs[:, 0]]
    for data, target in zip(sources, pairs[:, 1], strict=True):
        kv[int(target)] = data


def gather_blocks(kv_BLCHPD: Tensor, blocks: Tensor, staging_nLChPD: Tensor, first_head: int = 0) -> None:
    """See `ops.gather_blocks`."""
    kv, staging = quantized_kv.bits(kv_BLCHPD), quantized_kv.bits(staging_nLChPD)
    for place, block in enumerate(blocks):
        staging[place] = kv[int(block), :, :, first_head : first_head + staging.shape[3]]


def scatter_blocks(kv_BLCHPD: Tensor, blocks: Tensor, staging_nLChPD: Tensor, first_head: int = 0) -> None:
    """See `ops.scatter_blocks`."""
    kv, staging = quantized_kv.bits(kv_BLCHPD), quantized_kv.bits(staging_nLChPD)
    for place, block in enumerate(blocks):
        kv[int(block), :, :, first_head : first_head + staging.shape[3]] = staging[place]
