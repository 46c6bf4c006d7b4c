"""Single experts out of a checkpoint, for ranks that hold some of them only: whichever they need, whenever.

Used by expert parallelism (`parallel/expert_weights.py`) at start, when experts move and when lost ones are filled in
again: the mapped file stays open, and what the system keeps of it in memory is the copy on the host. Knows names and
shapes, not who holds what. Legend: X experts, K hidden size, F width of an expert, F' of this rank's part of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from penstock.workers.model.checkpoint import Checkpoint
from penstock.workers.model.expert_layers import ExpertLayers
from penstock.workers.model.loading import STACKED_BLOCK, STACKED_DOWN, STACKED_GATE_UP, layer_prefix, stacked_experts
from penstock.workers.parallel.shards import TensorShard


class CheckpointExperts:
    """`ExpertSource` for the layers with experts, numbered from 0 among themselves."""

    def __init__(
        self, how: ExpertLayers, hidden: int, checkpoint: Checkpoint, dtype: torch.dtype, shard: TensorShard
    ) -> None:
        """`shard` cuts every expert's width."""
        self._how = how
        self._hidden = hidden
        self._checkpoint = checkpoint
        self._dtype = dtype
        self._columns = shard.columns(how.width)
        self._numbers = [number for number, here in enumerate(how.layers) if here]

    def has(self, layer: int, expert: int) -> bool:
        """See `ExpertSource.has`: a checkpoint has all of them."""
        return layer < len(self._numbers) and expert < self._how.count

    def read(self, layer: int, expert: int) -> tuple[Tensor, Tensor]:
        """See `ExpertSource.read`: (gate_up [2 F', K], down [K, F']). Raises ModelError naming the tensor."""
        prefix = layer_prefix(self._numbers[layer])
        if stacked_experts(self._checkpoint, prefix):
            gate_up, down = self._stacked(prefix + STACKED_BLOCK, expert)
        else:
            gate_up, down = self._single(f"{prefix}{self._how.names.block}experts.{expert}.")
        return gate_up.to(self._dtype), down.to(self._dtype)

    def _stacked(self, block: str, expert: int) -> tuple[Tensor, Tensor]:
        how, own = self._how, self._columns
        take, gate_up_name, down_name = self._checkpoint.take, block + STACKED_GATE_UP, block + STACKED_DOWN
        both = self._checkpoint.read(gate_up_name, (how.count, 2 * how.width, self._hidden))[expert]
        down = self._checkpoint.read(down_name, (how.count, self._hidden, how.width))[expert]
        gate = take(gate_up_name, both[own.start : own.stop])
        up = take(gate_up_name, both[how.width + own.start : how.width + own.stop])
        return torch.cat((gate, up)), take(down_name, down[:, own.start : own.stop])

    def _single(self, prefix: str) -> tuple[Tensor, Tensor]:
        names, own, width, hidden = self._how.names, self._columns, self._how.width, self._hidden
        read, take, down = self._checkpoint.read, self._checkpoint.take, f"{prefix}{names.down}.weight"
        gate, up = (
            take(name, read(name, (width, hidden))[own.start : own.stop])
            for name in (f"{prefix}{names.gate}.weight", f"{prefix}{names.up}.weight")
        )
        return torch.cat((gate, up)), take(down, read(down, (hidden, width))[:, own.start : own.stop])
