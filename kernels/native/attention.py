"""Paged attention on the CPU over tiles of new tokens, and the step's plan of them; see `attention.cpp`.

Called through `kernels/ops.py`; knows only tensors. Legend: N rows, T tokens, W block-table width, B blocks, L layers,
C = 2 (key, value), Hq query heads, H kv heads, P slots of a block, D head dim.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from penstock.kernels.errors import KernelInputError
from penstock.kernels.native.library import function
from penstock.kernels.ragged import AttentionPlan, AttentionWorkspace, RaggedBatch

I32 = NDArray[np.int32]

# Lines (token, query head of one group) of a tile: enough to pay for the keys' re-ordering, few enough for the cache.
_TILE_LINES = 96


class _Batch(ctypes.Structure):
    _fields_ = (
        ("starts", ctypes.c_void_p),
        ("offsets", ctypes.c_void_p),
        ("tables", ctypes.c_void_p),
        ("table_width", ctypes.c_int64),
        ("tiles", ctypes.c_void_p),
        ("num_tiles", ctypes.c_int64),
    )


class Shape(ctypes.Structure):
    """The sizes of one call, as `attention.cpp` reads them; strides in elements, `head_stride` between kv heads."""

    _fields_ = (
        ("q_stride", ctypes.c_int64),
        ("block_stride", ctypes.c_int64),
        ("part_stride", ctypes.c_int64),
        ("head_stride", ctypes.c_int64),
        ("kv_heads", ctypes.c_int64),
        ("group", ctypes.c_int64),
        ("slots", ctypes.c_int64),
        ("dim", ctypes.c_int64),
        ("value_dim", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("soft_cap", ctypes.c_float),
        ("window", ctypes.c_int64),
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Tiling:
    """A batch cut for one size of head groups; `batch` points into the arrays, which live as long."""

    batch: _Batch
    tiles: I32  # [n, 3] row, first and last + 1 of its new tokens
    most_tokens: int


@dataclass(frozen=True, slots=True, eq=False)
class TiledPlan(AttentionPlan):
    """Rows as contiguous arrays whose block numbers were checked, and where every new token is stored."""

    places: Tensor  # [T] int64: block * P + slot
    tilings: dict[int, _Tiling] = field(default_factory=dict)  # by query heads per kv head


def plan_attention(kv_BLCHPD: Tensor, batch: RaggedBatch, workspace: AttentionWorkspace | None = None) -> TiledPlan:
    """See `ops.plan_attention`. Raises ValueError for a block number that the storage does not have."""
    blocks, slots = kv_BLCHPD.shape[0], kv_BLCHPD.shape[4]
    batch = RaggedBatch(*(np.ascontiguousarray(a, np.int32) for a in (batch.starts, batch.offsets, batch.block_tables)))
    counts = np.diff(batch.offsets)
    used = -(-(batch.starts + counts) // slots)
    tables = batch.block_tables
    if len(counts) == 0:
        return TiledPlan(batch, torch.empty(0, dtype=torch.int64))
    named = tables[np.arange(tables.shape[1]) < used[:, None]]
    if len(named) and (named.min() < 0 or named.max() >= blocks):
        raise KernelInputError("plan_attention", "block_tables", f"a number outside 0 .. {blocks - 1}")
    if len(counts) == batch.num_tokens and counts.max() == 1:
        rows, positions = np.arange(len(counts)), batch.starts
    else:
        rows = np.repeat(np.arange(len(counts)), counts)
        positions = batch.starts[rows] + (np.arange(batch.num_tokens) - batch.offsets[rows])
    places = tables[rows, positions // slots].astype(np.int64) * slots + positions % slots
    return TiledPlan(batch, torch.from_numpy(places))


def own_plan(plan: AttentionPlan) -> TiledPlan:
    """The plan as this backend made it."""
    if not isinstance(plan, TiledPlan):
        raise KernelInputError("attention", "plan", f"{type(plan).__name__} was made by another backend than native")
    return plan


def _tiling(plan: TiledPlan, group: int) -> _Tiling:
    """The plan's tiles for this group, made at the first call; the costliest come first."""
    if group not in plan.tilings:
        batch, counts = plan.batch, plan.batch.counts
        size = max(1, _TILE_LINES // group)
        pieces = -(-counts // size)
        rows = np.repeat(np.arange(len(counts)), pieces)
        begins = (np.arange(len(rows)) - np.repeat(np.cumsum(pieces) - pieces, pieces)) * size
        ends = np.minimum(begins + size, counts[rows])
        order = np.argsort(-(batch.starts[rows] + ends) * (ends - begins), kind="stable")
        tiles = np.ascontiguousarray(np.stack((rows, begins, ends), axis=1)[order], np.int32)
        address = _Batch(
            batch.starts.ctypes.data,
            batch.offsets.ctypes.data,
            batch.block_tables.ctypes.data,
            batch.block_tables.shape[1],
            tiles.ctypes.data,
            len(tiles),
        )
        plan.tilings[group] = _Tiling(address, tiles, int((ends - begins).max(initial=1)))
    return plan.tilings[group]


def paged_attention(
    q_THD: Tensor,
    kv_BLCHPD: Tensor,
    layer: int,
    plan: AttentionPlan,
    scale: float,
    *,
    window: int = 0,
    soft_cap: float = 0.0,
) -> Tensor:
    """See `ops.paged_attention`. Storages of codes are served by `kernels/cpu`."""
    return _attend(q_THD, kv_BLCHPD, layer, plan, (scale, soft_cap, window), None)


def paged_attention_with_lse(
    q_THD: Tensor,
    kv_BLCHPD: Tensor,
    layer: int,
    plan: AttentionPlan,
    scale: float,
    *,
    window: int = 0,
    soft_cap: float = 0.0,
    kv_scales: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `ops.paged_attention_with_lse`. Storages of codes are served by `kernels/cpu`."""
    lse = torch.empty(q_THD.shape[:2], dtype=torch.float32)
    return _attend(q_THD, kv_BLCHPD, layer, plan, (scale, soft_cap, window), lse), lse


def _attend(
    q_THD: Tensor,
    kv_BLCHPD: Tensor,
    layer: int,
    plan: AttentionPlan,
    scoring: tuple[float, float, int],
    lse_TH: Tensor | None,
) -> Tensor:
    """`scoring`: scale, soft cap and window. The log-sum-exp is written where there is room for it."""
    _, layers, parts, heads, slots, dim = kv_BLCHPD.shape
    tokens, query_heads, _ = q_THD.shape
    own = own_plan(plan)
    if not kv_BLCHPD.is_contiguous() or tokens != own.batch.num_tokens:
        raise KernelInputError("attention", "kv or q", f"kv not contiguous, or {tokens} tokens are not the plan's")
    if q_THD.stride(2) != 1 or q_THD.stride(1) != dim:
        q_THD = q_THD.contiguous()
    out = torch.empty(tokens, query_heads, dim, dtype=q_THD.dtype)
    part, group = heads * slots * dim, query_heads // heads
    strides = q_THD.stride(0), layers * parts * part, part, slots * dim
    shape = Shape(*strides, heads, group, slots, dim, dim, *scoring)
    run_tiles(q_THD, kv_BLCHPD, layer * parts * part, own, shape, out, lse_TH)
    return out


def run_tiles(
    q_THD: Tensor, kv_BLCHPD: Tensor, first: int, plan: TiledPlan, shape: Shape, out: Tensor, lse_TH: Tensor | None
) -> None:
    """Attend to the keys from element `first` of the storage on, tile by tile, into `out`; arguments are checked."""
    tiling = _tiling(plan, shape.group)
    function("attention", q_THD.dtype)(
        q_THD.data_ptr(),
        kv_BLCHPD.data_ptr() + first * kv_BLCHPD.element_size(),
        ctypes.addressof(tiling.batch),
        ctypes.addressof(shape),
        tiling.most_tokens,
        out.data_ptr(),
        0 if lse_TH is None else lse_TH.data_ptr(),
    )
