"""Writing KV blocks by the places of a tiled plan; attention's own path writes them in `elementwise.cpp`.

Called through `kernels/ops.py` by models that rotate their keys themselves; knows only tensors. Legend: B blocks,
L layers, C = 2 (key, value), H kv heads, P slots of a block, D head dim, T tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from penstock.kernels.native.attention import own_plan
from penstock.kernels.ragged import AttentionPlan


def write_kv(kv_BLCHPD: Tensor, layer: int, new_TCHD: Tensor, plan: AttentionPlan) -> None:
    """See `ops.write_kv`."""
    slots, places = kv_BLCHPD.shape[4], own_plan(plan).places
    kv_BPCHD = kv_BLCHPD[:, layer].permute(0, 3, 1, 2, 4)
    kv_BPCHD[places // slots, places % slots] = torch.nan_to_num(new_TCHD)
