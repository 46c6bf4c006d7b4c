"""Weights packed while their rows come in, so that the rows as they were read never exist whole beside the packed ones.

Called by `workers/model/weight_reader.py` and `loading.py` at load, in place of `ops.pack_weight` and
`ops.pack_experts`, whose results these are. Only the C++ kernels' panels can be made piece by piece; other backends get
their weight whole at the end.
Legend: K inputs, M outputs, E experts, F width of one expert.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from penstock.kernels import ops
from penstock.kernels.dispatch import choose
from penstock.kernels.native.linear import PANEL, PanelWeight, pack_panels, panel_numbers, whole_words
from penstock.kernels.native.moe import PanelExperts
from penstock.kernels.packing import PackedExperts, PackedWeight

SCRATCH_BYTES = 512 << 10


class RowSink(Protocol):
    """Takes the rows of one weight [M, K] in their order, in any dtype and stride."""

    def put(self, rows: Tensor) -> None:
        """The next rows, [n, K]; they are copied."""
        ...

    def flush(self) -> None:
        """All rows are there. Raises ValueError where they are not."""
        ...


class WholeRows:
    """Rows into a tensor as they come."""

    def __init__(self, out_MK: Tensor) -> None:
        self._out = out_MK
        self._begin = 0

    def put(self, rows: Tensor) -> None:
        """See `RowSink.put`."""
        self._out[self._begin : self._begin + len(rows)].copy_(rows)
        self._begin += len(rows)

    def flush(self) -> None:
        """See `RowSink.flush`."""
        if self._begin != len(self._out):
            raise ValueError(f"{self._begin} of {len(self._out)} rows have come")


class PanelRows:
    """Rows into panels, through a piece of a few of them."""

    def __init__(self, panels: Tensor, inputs: int, scratch: Tensor) -> None:
        """`panels` flat, of `native.linear.panel_numbers` numbers; `scratch` serves until the next `flush`."""
        room = scratch.view(panels.dtype)
        panels_held = len(room) // (PANEL * inputs)
        if not panels_held:  # very long rows
            room, panels_held = torch.empty(PANEL * inputs, dtype=panels.dtype), 1
        self._piece = room[: panels_held * PANEL * inputs].view(-1, inputs)
        self._panels = panels
        self._held = 0
        self._done = 0

    def put(self, rows: Tensor) -> None:
        """See `RowSink.put`."""
        taken = 0
        while taken < len(rows):
            count = min(len(rows) - taken, len(self._piece) - self._held)
            self._piece[self._held : self._held + count].copy_(rows[taken : taken + count])
            taken, self._held = taken + count, self._held + count
            if self._held == len(self._piece):
                self._pack()

    def flush(self) -> None:
        """See `RowSink.flush`."""
        self._pack()
        if panel_numbers(self._done, self._piece.shape[1]) != len(self._panels):
            raise ValueError(f"{self._done} rows do not fill the panels")

    def _pack(self) -> None:
        if self._held:
            pack_panels(self._piece[: self._held], self._panels[self._done * self._piece.shape[1] :])
        self._done, self._held = self._done + self._held, 0


def new_scratch() -> Tensor:
    """Memory for pieces, kept for a whole load: many small ones would leave holes between the weights."""
    return torch.empty(SCRATCH_BYTES, dtype=torch.uint8)


class WeightPacking:
    """One weight under way: fill `rows`, then `finish`, before the next one with the same scratch."""

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device, scratch: Tensor) -> None:
        """`shape` is (M, K)."""
        self._shape = outputs, inputs = shape
        self._native = choose(device.type, dtype).name == "native" and outputs > 0 and whole_words(inputs, dtype)
        size = (panel_numbers(outputs, inputs),) if self._native else self._shape
        self._weight = torch.empty(size, dtype=dtype, device=device)
        self.rows: RowSink = WholeRows(self._weight)
        if self._native:
            self.rows = PanelRows(self._weight, inputs, scratch)

    def finish(self, bias: Tensor | None = None) -> PackedWeight:
        """Semantics: as `ops.pack_weight` of all rows and `bias` [M]."""
        self.rows.flush()
        if not self._native:
            return ops.pack_weight(self._weight, bias)
        return PanelWeight(self._weight, None if bias is None else bias.to(self._weight.dtype), *self._shape, True)


class ExpertsPacking:
    """All experts of a layer under way: fill `gate_up(e)` and `down(e)`, flush each, then `finish`."""

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device, scratch: Tensor) -> None:
        """`shape` is (E, F, K)."""
        self._shape = experts, width, inputs = shape
        self._scratch = scratch
        fits = whole_words(inputs, dtype) and whole_words(width, dtype)
        self._native = choose(device.type, dtype).name == "native" and experts > 0 and fits
        sizes = (2 * width, inputs), (inputs, width)
        shapes = [(panel_numbers(*size),) if self._native else size for size in sizes]
        self._gate_up, self._down = (torch.empty(experts, *each, dtype=dtype, device=device) for each in shapes)

    def gate_up(self, expert: int) -> RowSink:
        """Takes [2 F, K], gate first."""
        return self._sink(self._gate_up[expert], self._shape[2])

    def down(self, expert: int) -> RowSink:
        """Takes [K, F]."""
        return self._sink(self._down[expert], self._shape[1])

    def finish(self) -> PackedExperts:
        """Semantics: as `ops.pack_experts`."""
        if not self._native:
            return ops.pack_experts(self._gate_up, self._down)
        return PanelExperts(*self._shape, self._gate_up, self._down)

    def _sink(self, out: Tensor, inputs: int) -> RowSink:
        return PanelRows(out, inputs, self._scratch) if self._native else WholeRows(out)
