"""The experts that one rank holds: packed weights in fixed slots, a host copy to refill from, and the switch.

Called by `expert_parallel.py` (reads, switches) and by the thread of `expert_rebalancing.py` (takes rows out, packs
fresh ones). It does not know why experts move, nor the other ranks.

Invariants: what a step computes with changes only in `switch`, which runs between steps; until then fresh weights lie
beside the slots. A slot's weights are bit for bit those that were read from the source, on whichever rank.
Legend: L layers with experts, E experts, C slots, K inputs, F width of an expert.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from penstock.kernels import ops
from penstock.kernels.expert_slots import add_places, put_expert, take_expert
from penstock.kernels.packing import PackedExperts
from penstock.workers.errors import IntegrityError
from penstock.workers.parallel.expert_placement import EMPTY, I32

I64 = NDArray[np.int64]

_CPU = torch.device("cpu")

# (layer, slot) -> (expert, its packed weights), ready to be switched to
Staged = Mapping[tuple[int, int], tuple[int, PackedExperts]]


@dataclass(frozen=True, slots=True)
class ExpertShape:
    """Sizes that all expert layers of a model share."""

    num_layers: int  # those with experts
    num_experts: int
    width: int  # F, of this rank's part where experts are cut by tensor parallelism too
    inputs: int  # K
    dtype: torch.dtype

    @property
    def row_numbers(self) -> int:
        """Numbers of one expert: gate, up and down."""
        return 3 * self.width * self.inputs


class ExpertSource(Protocol):
    """Where raw weights can be read from on this host: a mapped checkpoint, or copies in memory."""

    def has(self, layer: int, expert: int) -> bool:
        """Whether `read` would answer."""
        ...

    def read(self, layer: int, expert: int) -> tuple[Tensor, Tensor]:
        """(gate_up [2 F, K], down [K, F]) in host memory, not to be written to. Called by any thread."""
        ...


class HostExperts:
    """Copies in host memory of some experts of every layer; a source for slots, and for ranks that lost theirs."""

    def __init__(self) -> None:
        self._weights: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def add(self, layer: int, expert: int, gate_up: Tensor, down: Tensor) -> None:
        """Keep these tensors, which the caller no longer writes to."""
        self._weights[layer, expert] = (gate_up, down)

    def has(self, layer: int, expert: int) -> bool:
        """See `ExpertSource.has`."""
        return (layer, expert) in self._weights

    def read(self, layer: int, expert: int) -> tuple[Tensor, Tensor]:
        """See `ExpertSource.read`."""
        return self._weights[layer, expert]


def hosted_by(source: ExpertSource, shape: ExpertShape) -> NDArray[np.bool_]:
    """[L, E] what the source has."""
    experts = range(shape.num_experts)
    return np.array(
        [[source.has(layer, expert) for expert in experts] for layer in range(shape.num_layers)], dtype=bool
    )


class ExpertSlots:
    """One rank's slots. Not thread-safe but for `row` and `pack` beside steps."""

    def __init__(self, shape: ExpertShape, source: ExpertSource, slots_LC: I32, device: torch.device = _CPU) -> None:
        """Fill the slots from the source; those that hold nothing (EMPTY) are there, with zeros."""
        self.shape = shape
        self._source = source
        self._device = device
        self._slots = slots_LC.copy()
        self._packed = [self._pack(layer, experts) for layer, experts in enumerate(slots_LC.tolist())]
        self._places: I64 = np.empty(0, dtype=np.int64)
        self._index()

    def packed(self, layer: int) -> PackedExperts:
        """What `ops.fused_moe` computes with; its experts are the slots."""
        return self._packed[layer]

    def places(self, layer: int) -> I64:
        """[E] slot of each expert, -1 for those elsewhere."""
        places: I64 = self._places[layer]
        return places

    @property
    def slots(self) -> I32:
        """[L, C] expert in each slot; not to be written to."""
        return self._slots

    def row(self, layer: int, expert: int) -> Tensor:
        """One expert as a flat row [3 F K] in host memory. Raises IntegrityError where this rank has it nowhere."""
        place = int(self._places[layer, expert])
        if self._source.has(layer, expert):
            gate_up, down = self._source.read(layer, expert)
        elif place >= 0:
            gate_up, down = take_expert(self._packed[layer], place)
        else:
            raise IntegrityError(f"expert {expert} of layer {layer} was asked of a rank that does not have it")
        return torch.cat([gate_up.reshape(-1), down.reshape(-1)]).to(_CPU)

    def pack(self, row: Tensor) -> PackedExperts:
        """A row as a slot wants it, for `switch`."""
        width, inputs = self.shape.width, self.shape.inputs
        gate_up, down = row.to(self._device).tensor_split([2 * width * inputs])
        return ops.pack_experts(gate_up.view(1, 2 * width, inputs), down.view(1, inputs, width))

    def switch(self, slots_LC: I32, staged: Staged) -> None:
        """Hold these from now on; an expert that stays keeps its slot.

        Raises IntegrityError, before anything changes, where a slot's expert is neither there nor staged.
        """
        wanted = [(layer, slot) for layer, slot in np.argwhere(self._fresh(slots_LC)).tolist()]
        for place in wanted:
            if place not in staged or staged[place][0] != slots_LC[place]:
                raise IntegrityError(f"expert {slots_LC[place]} of layer {place[0]} is not staged for slot {place[1]}")
        more = slots_LC.shape[1] - self._slots.shape[1]
        if more > 0:
            self._packed = [add_places(packed, more) for packed in self._packed]
        for layer, slot in wanted:
            self._packed[layer] = put_expert(self._packed[layer], slot, staged[layer, slot][1])
        self._slots = slots_LC.copy()
        self._index()

    def _fresh(self, slots_LC: I32) -> NDArray[np.bool_]:
        before = np.full(slots_LC.shape, EMPTY, dtype=np.int32)
        if slots_LC.shape[1] < self._slots.shape[1]:
            raise IntegrityError(f"{slots_LC.shape[1]} slots a layer where there are {self._slots.shape[1]}")
        before[:, : self._slots.shape[1]] = self._slots
        fresh: NDArray[np.bool_] = (slots_LC != before) & (slots_LC != EMPTY)
        return fresh

    def _index(self) -> None:
        places = np.full((self.shape.num_layers, self.shape.num_experts), -1, dtype=np.int64)
        layers, slots = np.nonzero(self._slots != EMPTY)
        places[layers, self._slots[layers, slots]] = slots
        self._places = places

    def _pack(self, layer: int, experts: list[int]) -> PackedExperts:
        shape = self.shape
        gate_up = torch.zeros(len(experts), 2 * shape.width, shape.inputs, dtype=shape.dtype)
        down = torch.zeros(len(experts), shape.inputs, shape.width, dtype=shape.dtype)
        for slot, expert in enumerate(experts):
            if expert != EMPTY:
                first, second = self._source.read(layer, expert)
                gate_up[slot].copy_(first)
                down[slot].copy_(second)
        return ops.pack_experts(gate_up.to(self._device), down.to(self._device))
