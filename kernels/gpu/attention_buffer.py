"""The one buffer of whole numbers in which a plan reaches the device, and the host memory that it is sent from.

Called by `attention_workspace.py`. Knows sections, sizes and transfers; not what the numbers mean to a kernel.
Legend: N rows, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from penstock.kernels.gpu.attention_items import ITEM_FIELDS
from penstock.kernels.gpu.attention_plan import I32, PlanArrays, PlanCaps

_ALIGN = 4  # whole numbers; sections begin at multiples of 16 bytes
_HEADER = 4  # counts of decode items, tile items and merges


@dataclass(frozen=True, slots=True)
class PlanLayout:
    """Where each section of the buffer begins; the block tables come last, so that only what is used is sent."""

    decode_items: int
    tile_items: int
    tokens: int
    positions: int
    write_slots: int
    merge_tokens: int
    merge_indptr: int
    merge_slots: int
    tables: int
    size: int


def layout_for(caps: PlanCaps, num_tokens: int, table_entries: int) -> PlanLayout:
    """Room for any plan within `caps`."""
    partials = caps.decode_partials + caps.tile_partials
    sizes = [
        _HEADER,
        ITEM_FIELDS * caps.decode_items,
        ITEM_FIELDS * caps.tile_items,
        caps.token_list,
        num_tokens,
        num_tokens,
        num_tokens,
        num_tokens + 1,
        partials,
        table_entries,
    ]
    ends = np.cumsum([-(-size // _ALIGN) * _ALIGN for size in sizes])
    return PlanLayout(*(int(end) for end in ends))


def pack(arrays: PlanArrays, layout: PlanLayout, num_tokens: int, out: I32) -> int:
    """Write a plan into `out` and return the numbers used.

    Tokens from the batch's own number to `num_tokens` are padding: they are written nowhere, and their list of partial
    states is empty, so that their result is 0.
    """
    real = len(arrays.positions)
    padding = num_tokens - real
    merges = len(arrays.merge_tokens)
    out[: _HEADER - 1] = len(arrays.decode_items), len(arrays.tile_items), merges + padding
    for name in ("decode_items", "tile_items", "tokens", "positions", "write_slots", "merge_tokens", "merge_slots"):
        section, begin = getattr(arrays, name), getattr(layout, name)
        out[begin : begin + section.size] = section.reshape(-1)
    out[layout.merge_indptr : layout.merge_indptr + merges + 1] = arrays.merge_indptr
    if padding:
        out[layout.write_slots + real : layout.write_slots + num_tokens] = -1
        begin = layout.merge_tokens + merges
        out[begin : begin + padding] = np.arange(real, num_tokens)
        begin = layout.merge_indptr + merges + 1
        out[begin : begin + padding] = len(arrays.merge_slots)
    rows, width = arrays.tables.shape
    out[layout.tables : layout.tables + rows * width].reshape(rows, width)[:] = arrays.tables
    return layout.tables + int(arrays.tables.size)


class PinnedRing:
    """Host buffers to send from; one is reused only when its last transfer has ended."""

    def __init__(self, size: int, device: torch.device, count: int) -> None:
        on_gpu = device.type != "cpu"
        self._buffers = [torch.empty(size, dtype=torch.int32, pin_memory=on_gpu) for _ in range(count if on_gpu else 1)]
        # torch gives its events no types.
        self._events = [torch.cuda.Event() for _ in self._buffers] if on_gpu else []  # type: ignore[no-untyped-call]
        self._next = 0

    def take(self) -> I32:
        """The buffer to fill; waits for the device only when it is several steps behind."""
        if self._events:
            self._events[self._next].synchronize()
        buffer: I32 = self._buffers[self._next].numpy()
        return buffer

    def send(self, used: int, target: Tensor) -> None:
        """Copy the filled buffer's first `used` numbers to `target`, in stream order."""
        target[:used].copy_(self._buffers[self._next][:used], non_blocking=True)
        if self._events:
            self._events[self._next].record()
            self._next = (self._next + 1) % len(self._buffers)
