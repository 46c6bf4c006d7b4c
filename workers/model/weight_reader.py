"""Copies one rank's part of every tensor out of a checkpoint, straight into its fused place, and counts them.

Used by `loading.py`, which knows the names. Only the part's bytes are read, half a megabyte of the file at a time, and
their memory is given back as soon as they are copied, so that a load takes hardly more memory than what it leaves. It
knows neither families nor whether the bytes come from our own file or from a peer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from penstock.kernels.packing import PackedWeight
from penstock.kernels.row_packing import ExpertsPacking, RowSink, WeightPacking, new_scratch
from penstock.workers import fault_points
from penstock.workers.fault_points import Point
from penstock.workers.model.checkpoint import Checkpoint
from penstock.workers.parallel.shards import WHOLE, TensorShard

Progress = Callable[[int, int], None]  # tensors read, tensors in all

_PIECE_BYTES = 512 << 10  # of the file, mapped at a time


@dataclass(frozen=True, slots=True)
class Cut:
    """The indices `part` of a dimension of `size`."""

    size: int
    part: range

    @staticmethod
    def whole(size: int) -> Cut:
        """All of it."""
        return Cut(size, range(size))

    def heads(self, dim: int) -> Cut:
        """The same of a dimension that has `dim` indices for each of ours."""
        return Cut(self.size * dim, range(self.part.start * dim, self.part.stop * dim))

    def __len__(self) -> int:
        return len(self.part)


@dataclass(slots=True)
class WeightReader:
    """Reads for one rank, in one dtype, onto one device."""

    checkpoint: Checkpoint
    dtype: torch.dtype
    total: int
    progress: Progress | None
    device: torch.device
    shard: TensorShard = WHOLE
    done: int = 0
    _scratch: Tensor = field(default_factory=new_scratch)

    def empty(self, *shape: int) -> Tensor:
        """Room for weights, of the wanted dtype."""
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def fused(self, names: list[str], shapes: list[tuple[int, ...]]) -> Tensor:
        """The named tensors, whole, below each other, in the wanted dtype, in memory of their own."""
        cuts = [tuple(Cut.whole(size) for size in shape) for shape in shapes]
        return self.fused_parts(dict(zip(names, cuts, strict=True)))

    def fused_parts(self, parts: Mapping[str, tuple[Cut, ...]]) -> Tensor:
        """The parts of the named tensors below each other; they differ in their first dimension only."""
        widths = next(iter(parts.values()))[1:]
        out = self.empty(sum(len(cuts[0]) for cuts in parts.values()), *(len(cut) for cut in widths))
        begin = 0
        for name, cuts in parts.items():
            self.copy(name, out[begin : begin + len(cuts[0])], cuts)
            begin += len(cuts[0])
        return out

    def copy(self, name: str, out: Tensor, cuts: tuple[Cut, ...] | None = None) -> None:
        """The named tensor, of the shape of `out`, into it; or the part of it that `cuts` tell."""
        part = self._part(name, cuts or tuple(Cut.whole(size) for size in out.shape))
        pairs = list(_pieces(out, part))
        arriving = self.checkpoint.arriving(name, [piece for _, piece in pairs])
        for (target, _), piece in zip(pairs, arriving, strict=True):
            target.copy_(piece)
        self.count(1)

    def packing(self, outputs: int, inputs: int) -> WeightPacking:
        """A weight under way, of the wanted dtype."""
        return WeightPacking((outputs, inputs), self.dtype, self.device, self._scratch)

    def packing_experts(self, experts: int, width: int, inputs: int) -> ExpertsPacking:
        """All experts of a layer under way, of the wanted dtype."""
        return ExpertsPacking((experts, width, inputs), self.dtype, self.device, self._scratch)

    def put(self, name: str, cuts: tuple[Cut, Cut], rows: RowSink) -> None:
        """The part of the named matrix, row by row, to `rows`."""
        self.put_rows(name, self._part(name, cuts), rows)
        self.count(1)

    def view(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The named tensor as it is mapped; see `put_rows`."""
        if fault_points.plan is not None:
            fault_points.plan.reach(Point.WEIGHTS_READ, "")
        return self.checkpoint.read(name, shape)

    def put_rows(self, name: str, matrix: Tensor, rows: RowSink) -> None:
        """A matrix out of a view of the named tensor to `rows`; does not count it."""
        count = max(1, _PIECE_BYTES // max(1, matrix.stride(0) * matrix.element_size()))
        pieces = [matrix[begin : begin + count] for begin in range(0, len(matrix), count)]
        for piece in self.checkpoint.arriving(name, pieces):
            rows.put(piece)

    def _part(self, name: str, cuts: tuple[Cut, ...]) -> Tensor:
        view = self.view(name, tuple(cut.size for cut in cuts))
        for cut, axis in zip(cuts, range(view.dim()), strict=True):
            view = view.narrow(axis, cut.part.start, len(cut))
        return view

    def count(self, tensors: int) -> None:
        """So many tensors are done with."""
        self.done += tensors
        if self.progress is not None:
            self.progress(self.done, self.total)

    def norm(self, name: str, size: int, offset: float) -> Tensor:
        """The named norm's weight [size]; float32 where an offset is added, which a narrow dtype would round away."""
        weight = self.fused([name], [(size,)])
        return weight.float().add_(offset) if offset else weight

    def linear(self, prefix: str, outputs: dict[str, int], inputs: int, with_bias: bool) -> PackedWeight:
        """The named projections, whole, as one packed linear."""
        return self.column_linear(prefix, {name: Cut.whole(size) for name, size in outputs.items()}, inputs, with_bias)

    def column_linear(self, prefix: str, outputs: Mapping[str, Cut], inputs: int, with_bias: bool) -> PackedWeight:
        """The named projections as one packed linear, of each the outputs that its cut tells."""
        every = Cut.whole(inputs)
        packing = self.packing(sum(map(len, outputs.values())), inputs)
        for name, cut in outputs.items():
            self.put(f"{prefix}{name}.weight", (cut, every), packing.rows)
        bias = None
        if with_bias:
            bias = self.fused_parts({f"{prefix}{name}.bias": (cut,) for name, cut in outputs.items()})
        return packing.finish(bias)

    def row_linear(self, name: str, outputs: int, inputs: Cut, with_bias: bool) -> PackedWeight:
        """The named projection of a part of its inputs: a term of a sum over ranks, to which one adds the bias."""
        packing = self.packing(outputs, len(inputs))
        self.put(f"{name}.weight", (Cut.whole(outputs), inputs), packing.rows)
        bias = None
        if with_bias and self.shard.adds_bias:
            bias = self.fused([f"{name}.bias"], [(outputs,)])
        elif with_bias:
            self.count(1)
        return packing.finish(bias)


def _pieces(out: Tensor, source: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """(target, source) pairs along the first dimensions that span at most `_PIECE_BYTES` of the file each."""
    if source.numel() == 0:
        return
    span = source.stride(0) * source.element_size()
    if span > _PIECE_BYTES and source.dim() > 1:
        for target, row in zip(out, source, strict=True):
            yield from _pieces(target, row)
        return
    rows = max(1, _PIECE_BYTES // max(1, span))
    for begin in range(0, len(source), rows):
        yield out[begin : begin + rows], source[begin : begin + rows]
