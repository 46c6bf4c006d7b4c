"""What the attention operations demand of their arguments, checked before any backend touches memory.

Called by `ops.py`. Shapes, dtypes, devices and layers are checked on every call; values (block numbers, NaN) only where
the caller says so, since reading them makes a GPU wait. Every failure is a KernelInputError naming the argument.
Legend: N rows, T tokens, D head dim, Hq query heads, H kv heads, B blocks, L layers, P slots of a block, n blocks.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from penstock.kernels import expect
from penstock.kernels.errors import KernelInputError
from penstock.kernels.quantized_kv import is_quantized
from penstock.kernels.ragged import AttentionPlan, RaggedBatch

MOST_DIM = 256
MOST_LATENT = 1024  # width of a stored row that serves as key and value
MOST_GROUP = 128
MOST_SLOTS = 1024


def storage(op: str, kv: Tensor) -> None:
    """Demand [B, L, 2, H, P, D], or [B, L, 1, 1, P, D] of latent rows, with sizes that the kernels serve."""
    if kv.dim() != 6 or kv.shape[2] not in (1, 2) or (kv.shape[2] == 1 and kv.shape[3] != 1):
        raise KernelInputError(op, "kv", f"shape {list(kv.shape)}; expected [B, L, 2, H, P, D] or [B, L, 1, 1, P, D]")
    slots, dim = kv.shape[4:]
    most = MOST_DIM if kv.shape[2] == 2 else MOST_LATENT
    if not 1 <= dim <= most:
        raise KernelInputError(op, "kv", f"head size {dim}; supported are 1 to {most}")
    if not 1 <= slots <= MOST_SLOTS:
        raise KernelInputError(op, "kv", f"{slots} slots a block; supported are 1 to {MOST_SLOTS}")
    if not is_quantized(kv):
        expect.dtype(op, "kv", kv, *expect.FLOATS)


def batch(op: str, kv: Tensor, rows: RaggedBatch, *, values: bool) -> None:
    """Demand lists that fit each other and tables wide enough; with `values`, blocks that exist and no empty row."""
    count = len(rows.offsets) - 1
    lists = (("starts", rows.starts, (count,)), ("offsets", rows.offsets, (count + 1,)))
    for name, numbers, shape in lists:
        if numbers.shape != shape or numbers.dtype.kind != "i":
            raise KernelInputError(op, name, f"{numbers.dtype} of shape {list(numbers.shape)}; expected {list(shape)}")
    if rows.block_tables.ndim != 2 or len(rows.block_tables) != count or rows.block_tables.dtype.kind != "i":
        raise KernelInputError(op, "block_tables", f"shape {list(rows.block_tables.shape)}; expected [{count}, any]")
    if not count:
        return
    counts = np.diff(rows.offsets)
    if rows.offsets[0] != 0 or int(counts.min()) < 0:
        raise KernelInputError(op, "offsets", "must begin with 0 and not fall")
    if int(rows.starts.min()) < 0:
        raise KernelInputError(op, "starts", "must not be negative")
    slots = kv.shape[4]
    longest = int((rows.starts + counts).max())
    if -(-longest // slots) > rows.block_tables.shape[1]:
        raise KernelInputError(
            op,
            "block_tables",
            f"{rows.block_tables.shape[1]} blocks wide; a row has {longest} tokens of {slots} a block",
        )
    if values:
        _batch_values(op, kv, rows, counts)


def _batch_values(
    op: str, kv: Tensor, rows: RaggedBatch, counts: np.ndarray[tuple[int, ...], np.dtype[np.int32]]
) -> None:
    empty = np.flatnonzero(counts == 0)
    if len(empty):
        raise KernelInputError(op, "offsets", f"row {empty[0]} has no new token")
    used = np.arange(rows.block_tables.shape[1]) < -(-(rows.starts + counts) // kv.shape[4])[:, None]
    wrong = used & ((rows.block_tables < 0) | (rows.block_tables >= len(kv)))
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        number = rows.block_tables[row, column]
        raise KernelInputError(op, "block_tables", f"block {number} of row {row}; the storage has {len(kv)}")


def new_tokens(kv: Tensor, layer: int, new: Tensor, plan: AttentionPlan, kv_scales: Tensor | None) -> None:
    """Demand new keys and values [T, 2, H, D], or latent rows [T, 1, 1, D], that the storage can take."""
    op = "write_kv"
    _layer(op, kv, layer)
    wanted = [*kv.shape[2:4], kv.shape[5]]
    if new.dim() != 4 or list(new.shape[1:]) != wanted:
        raise KernelInputError(op, "new", f"shape {list(new.shape)}; expected [T, {', '.join(map(str, wanted))}]")
    if not plan.batch.num_tokens <= len(new) <= plan.num_tokens:
        raise KernelInputError(op, "new", f"{len(new)} tokens; the plan has {plan.num_tokens}")
    _fitting(op, "new", new, kv, kv_scales)


def queries(
    op: str,
    q: Tensor,
    kv: Tensor,
    layer: int,
    plan: AttentionPlan,
    window: int,
    kv_scales: Tensor | None,
    *,
    values: bool,
) -> None:
    """Demand queries [T, Hq, D] of the storage's heads and size; with `values`, without NaN."""
    _layer(op, kv, layer)
    if kv.shape[2] != 2:
        raise KernelInputError(op, "kv", f"shape {list(kv.shape)} is of latent rows; latent_attention reads those")
    if q.dim() != 3 or q.shape[2] != kv.shape[5]:
        raise KernelInputError(op, "q", f"shape {list(q.shape)}; expected [T, heads, {kv.shape[5]}]")
    heads, kv_heads = q.shape[1], kv.shape[3]
    if heads % kv_heads or not 1 <= heads // kv_heads <= MOST_GROUP:
        raise KernelInputError(op, "q", f"{heads} heads; expected 1 to {MOST_GROUP} times the {kv_heads} of kv")
    if window < 0:
        raise KernelInputError(op, "window", f"{window}; expected 0 or more")
    _planned(op, q, kv, plan, kv_scales, values=values)


def latent_queries(
    op: str, q: Tensor, kv: Tensor, layer: int, plan: AttentionPlan, value_dim: int, *, values: bool
) -> None:
    """Demand queries [T, Hq, D] as wide as the storage's latent rows, and values no wider; else as `queries`."""
    _layer(op, kv, layer)
    if kv.shape[2:4] != (1, 1):
        raise KernelInputError(op, "kv", f"shape {list(kv.shape)}; expected [B, L, 1, 1, P, D]")
    if q.dim() != 3 or q.shape[2] != kv.shape[5] or not 1 <= q.shape[1] <= MOST_GROUP:
        wanted = f"[T, 1 to {MOST_GROUP}, {kv.shape[5]}]"
        raise KernelInputError(op, "q", f"shape {list(q.shape)}; expected {wanted}")
    if not 1 <= value_dim <= kv.shape[5]:
        raise KernelInputError(op, "value_dim", f"{value_dim}; expected 1 to {kv.shape[5]}")
    _planned(op, q, kv, plan, None, values=values)


def _planned(op: str, q: Tensor, kv: Tensor, plan: AttentionPlan, kv_scales: Tensor | None, *, values: bool) -> None:
    if not plan.batch.num_tokens <= len(q) <= plan.num_tokens:
        raise KernelInputError(op, "q", f"{len(q)} tokens; the plan has {plan.num_tokens}")
    _fitting(op, "q", q, kv, kv_scales)
    if values and bool(torch.isnan(q[: plan.batch.num_tokens]).any()):
        raise KernelInputError(op, "q", "holds NaN")


def moved(op: str, kv: Tensor, blocks: Tensor, staging: Tensor, first_head: int, *, values: bool) -> None:
    """Demand one staging block [L, 2, h, P, D] of the storage's dtype for each number in `blocks`."""
    storage(op, kv)
    numbers(op, "blocks", kv, blocks, 1, values=values)
    _, layers, parts, heads, slots, dim = kv.shape
    if staging.dim() != 6 or staging.shape[:3] != (len(blocks), layers, parts) or staging.shape[4:] != (slots, dim):
        wanted = f"[{len(blocks)}, {layers}, {parts}, any, {slots}, {dim}]"
        raise KernelInputError(op, "staging", f"shape {list(staging.shape)}; expected {wanted}")
    if not 0 <= first_head <= heads - staging.shape[3]:
        raise KernelInputError(op, "first_head", f"{first_head} and {staging.shape[3]} more; kv has {heads} heads")
    expect.dtype(op, "staging", staging, kv.dtype)
    expect.device(op, "staging", staging, kv)
    if not staging.is_contiguous():
        raise KernelInputError(op, "staging", f"strides {staging.stride()}; must be contiguous")


def numbers(op: str, argument: str, kv: Tensor, blocks: Tensor, dims: int, *, values: bool) -> None:
    """Demand block numbers as int64; with `values`, of blocks that exist."""
    if blocks.dim() != dims or (dims == 2 and blocks.shape[1] != 2):
        raise KernelInputError(op, argument, f"shape {list(blocks.shape)}; expected {'[n, 2]' if dims == 2 else '[n]'}")
    expect.dtype(op, argument, blocks, torch.int64)
    if values and len(blocks) and not 0 <= int(blocks.min()) <= int(blocks.max()) < len(kv):
        raise KernelInputError(op, argument, f"a block number is outside 0 to {len(kv) - 1}")


def states(o: Tensor, lse: Tensor, indptr: Tensor) -> None:
    """Demand states o [S, heads, D] with lse [S, heads] and one list of ends."""
    op = "merge_states"
    expect.dtype(op, "o", o, *expect.FLOATS)
    if o.dim() != 3 or not 1 <= o.shape[2] <= MOST_DIM:
        raise KernelInputError(op, "o", f"shape {list(o.shape)}; expected [S, heads, 1 to {MOST_DIM}]")
    expect.shape(op, "lse", lse, *o.shape[:2])
    expect.dtype(op, "lse", lse, torch.float32, torch.float64)
    expect.shape(op, "merge_indptr", indptr, None)
    expect.dtype(op, "merge_indptr", indptr, *expect.INTEGERS)
    if not len(indptr):
        raise KernelInputError(op, "merge_indptr", "is empty; expected [M + 1]")
    expect.device(op, "lse", lse, o)
    expect.device(op, "merge_indptr", indptr, o)


def _layer(op: str, kv: Tensor, layer: int) -> None:
    if kv.dim() != 6:
        storage(op, kv)
    if not 0 <= layer < kv.shape[1]:
        raise KernelInputError(op, "layer", f"{layer}; the storage has {kv.shape[1]}")


def _fitting(op: str, name: str, tensor: Tensor, kv: Tensor, kv_scales: Tensor | None) -> None:
    """Of the storage's device; of its dtype, or any float beside scales where the storage holds codes."""
    if tensor.device != kv.device:
        raise KernelInputError(op, name, f"on {tensor.device}; expected {kv.device}")
    if kv_scales is None:
        if is_quantized(kv):
            raise KernelInputError(op, "kv_scales", f"missing; a storage of {kv.dtype} needs them")
        if tensor.dtype != kv.dtype:
            raise KernelInputError(op, name, f"dtype {tensor.dtype}; expected {kv.dtype}")
        return
    if not is_quantized(kv):
        raise KernelInputError(op, "kv_scales", f"given with a storage of {kv.dtype}")
    expect.dtype(op, name, tensor, *expect.FLOATS)
    expect.shape(op, "kv_scales", kv_scales, kv.shape[1], 2, kv.shape[3])
    expect.dtype(op, "kv_scales", kv_scales, torch.float32)
    expect.device(op, "kv_scales", kv_scales, kv)
    if not kv_scales.is_contiguous():
        raise KernelInputError(op, "kv_scales", f"strides {kv_scales.stride()}; must be contiguous")
