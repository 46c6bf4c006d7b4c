"""Low-rank adapters, many in one batch, on the GPU: tokens in tiles of one adapter each, or each token by itself.

Called through `kernels/ops.py`; knows only tensors. After Chen et al. 2023 (Punica, section 4): SGMV for segments, BGMV
where a step decodes and most adapters differ. Which of the two serves is the caller's word, not the batch's: a token's
result does not change with its neighbours. A plan is one table of fixed size, so a captured graph can be given the
next step's by copying. Legend: T tokens, K inputs, M outputs, R rank, S adapter slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import triton
from numpy.typing import NDArray
from torch import Tensor

from penstock.kernels import expect
from penstock.kernels.adapters import check_lora, slots_needed, sorted_segments
from penstock.kernels.errors import KernelInputError
from penstock.kernels.gpu.lora_kernels import (
    ORDER,
    SLOT,
    TABLE_ROWS,
    TILE_COUNT,
    TILE_SLOT,
    TILE_START,
    default_config,
    expand_tiles_kernel,
    expand_tokens_kernel,
    shrink_tiles_kernel,
    shrink_tokens_kernel,
)
from penstock.kernels.gpu.tuning import config_for
from penstock.kernels.packing import LoraPlan

# Tokens of a tile, where a step has at most this many tokens and where it has more.
_FEW_TOKENS, _SMALL_TILE, _LARGE_TILE = 512, 16, 64


@dataclass(frozen=True, slots=True, eq=False)
class DevicePlan(LoraPlan):
    """`table` is int32 [5, T]: tokens in order of slot; slot, first place and size of each tile; slot of each token."""

    table: Tensor
    tile: int
    per_token: bool

    def overwrite(self, other: DevicePlan) -> None:
        """Make this plan say what `other` says, in the same memory; both for the same number of tokens.

        `segments` and `num_slots` stay those of the first plan: the kernels do not read them.
        """
        if other.num_tokens != self.num_tokens or other.per_token != self.per_token:
            raise KernelInputError("plan_lora", "plan", "made for another number of tokens or another kind of step")
        self.table.copy_(other.table, non_blocking=True)


def plan_lora(slots: Tensor, device: torch.device | None = None, per_token: bool = False) -> DevicePlan:
    """See `ops.plan_lora`."""
    order, segments = sorted_segments(slots)
    tokens = len(slots)
    tile = _SMALL_TILE if tokens <= _FEW_TOKENS else _LARGE_TILE
    table = torch.from_numpy(_table(slots.cpu().numpy(), order, segments, tile))
    target = slots.device if device is None else device
    placed = table.pin_memory().to(target, non_blocking=True) if target.type == "cuda" else table
    return DevicePlan(tokens, slots_needed(segments), placed[ORDER], segments, placed, tile, per_token)


def _table(
    slots: NDArray[np.int64], order: NDArray[np.int64], segments: tuple[tuple[int, int, int], ...], tile: int
) -> NDArray[np.int32]:
    table = np.full((TABLE_ROWS, len(slots)), -1, dtype=np.int32)
    table[ORDER, : len(order)] = order
    table[TILE_COUNT] = 0
    table[SLOT] = slots
    filled = 0
    for slot, start, end in segments:
        starts = np.arange(start, end, tile)
        here = slice(filled, filled + len(starts))
        table[TILE_SLOT, here] = slot
        table[TILE_START, here] = starts
        table[TILE_COUNT, here] = np.minimum(end - starts, tile)
        filled += len(starts)
    return table


def lora_add(y_TM: Tensor, x_TK: Tensor, a_SRK: Tensor, b_SMR: Tensor, scales_S: Tensor, plan: LoraPlan) -> None:
    """See `ops.lora_add`."""
    check_lora(y_TM, x_TK, a_SRK, b_SMR, scales_S, plan)
    expect.dtype("lora_add", "x", x_TK, torch.float32, torch.bfloat16, torch.float16)
    if not isinstance(plan, DevicePlan):
        raise TypeError("this plan was made by another backend")
    tokens, inputs = x_TK.shape
    slots, rank, _ = a_SRK.shape
    outputs = y_TM.shape[1]
    if not tokens or not outputs:
        return
    config = config_for("lora", {"R": rank, "K": inputs, "M": outputs}, default_config(rank, inputs))
    split = config["SPLIT_K"]
    sums = torch.empty(split, tokens, rank, device=x_TK.device, dtype=torch.float32)
    sizes = {"BLOCK_R": max(triton.next_power_of_2(rank), 16), "SPLIT_K": split}
    options = {"num_warps": config["num_warps"], "num_stages": config["num_stages"]}
    shrink, expand = shrink_tokens_kernel, expand_tokens_kernel
    tiles = tokens
    if not plan.per_token:
        shrink, expand = shrink_tiles_kernel, expand_tiles_kernel
        sizes["BLOCK_T"] = plan.tile
        tiles = _most_tiles(tokens, slots, plan.tile)
    shrink[(tiles, split)](
        x_TK,
        a_SRK,
        sums,
        plan.table,
        tokens,
        slots,
        rank,
        inputs,
        x_TK.stride(0),
        a_SRK.stride(0),
        a_SRK.stride(1),
        BLOCK_K=config["BLOCK_K"],
        **sizes,
        **options,
    )
    expand[(tiles, triton.cdiv(outputs, config["BLOCK_M"]))](
        y_TM,
        b_SMR,
        scales_S,
        sums,
        plan.table,
        tokens,
        slots,
        rank,
        outputs,
        y_TM.stride(0),
        b_SMR.stride(0),
        b_SMR.stride(1),
        BLOCK_M=config["BLOCK_M"],
        **sizes,
        **options,
    )


def _most_tiles(tokens: int, slots: int, tile: int) -> int:
    """No assignment of tokens to slots needs more tiles."""
    used = min(tokens, slots)
    return used + (tokens - used) // tile
