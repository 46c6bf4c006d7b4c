"""Room on the device for a few adapters, side by side for the kernels, and the adapters of one step's tokens.

Made by `model_build.py`; `runner.py` makes a `StepAdapters` of a plan, which the decoder asks after every projection
that an adapter may change. A place holds one adapter, all of its projections padded with zeros to the largest rank, so
the result is exact. A rank of a tensor-parallel group holds the part of A and B that goes with its part of the weights.
Which of the kernels' ways computes a token depends on neither its step nor its neighbours.
Method: Chen et al. 2023 (Punica, section 4). Legend: S places, R largest rank, K inputs, M outputs, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from penstock.kernels import ops
from penstock.kernels.packing import LoraPlan
from penstock.workers.lora.projections import PROJECTIONS, Place, adaptable
from penstock.workers.lora.weights import HostAdapter, Update
from penstock.workers.model.config import DecoderConfig
from penstock.workers.parallel.shards import WHOLE, TensorShard
from penstock.workers.scheduler.plan import StepPlan


@dataclass(frozen=True, slots=True, eq=False)
class Room:
    """For one projection of one layer."""

    a: Tensor  # [S, R, K]
    b: Tensor  # [S, M, R]
    scales: Tensor  # [S] float32


class AdapterBank:
    """`num_places` adapters of at most `max_rank`."""

    def __init__(
        self,
        config: DecoderConfig,
        num_places: int,
        max_rank: int,
        dtype: torch.dtype,
        device: torch.device,
        shard: TensorShard = WHOLE,
    ) -> None:
        """Takes the memory at once. Raises ConfigError for a model whose adapters are not served."""
        self.num_places, self.max_rank = num_places, max_rank
        self.device, self.dtype = device, dtype
        self._parts = dict(_parts(config, shard))
        self.sizes = adaptable(config)  # of what adapters of this model may change, on all ranks together
        self._rooms: dict[Place, Room] = {}
        for place in self.sizes:
            inputs, outputs = self._parts[place[1]]
            self._rooms[place] = Room(
                torch.zeros(num_places, max_rank, len(inputs), dtype=dtype, device=device),
                torch.zeros(num_places, len(outputs), max_rank, dtype=dtype, device=device),
                torch.zeros(num_places, dtype=torch.float32, device=device),
            )

    def put(self, place: int, adapter: HostAdapter) -> None:
        """Make the place this adapter's; in order with steps that were launched before."""
        for where in self.sizes:
            self.put_update(place, where, adapter.updates.get(where))

    def put_update(self, place: int, where: Place, update: Update | None) -> None:
        """The same for one projection; None: the adapter leaves it as it is."""
        room = self._rooms[where]
        room.scales[place] = 0.0 if update is None else update.scale
        room.a[place].zero_()
        room.b[place].zero_()
        if update is not None:
            rank, (inputs, outputs) = len(update.a), self._parts[where[1]]
            room.a[place, :rank] = update.a[:, inputs.start : inputs.stop].to(room.a)
            room.b[place, :, :rank] = update.b[outputs.start : outputs.stop].to(room.b)

    def step(self, plan: StepPlan) -> StepAdapters | None:
        """The adapters of a plan's tokens; None where no row has one."""
        if not len(plan.adapters):
            return None
        tokens = np.repeat(plan.adapters, np.diff(plan.offsets)).astype(np.int64)
        wanted = tokens[plan.offsets[plan.sample_rows + 1] - 1]
        if plan.scored is not None:
            wanted = np.concatenate((wanted, tokens[plan.scored.token_rows]))
        return StepAdapters(self._rooms, self._plan(tokens), self._plan(wanted))

    def _plan(self, places: np.ndarray[tuple[int, ...], np.dtype[np.int64]]) -> LoraPlan:
        return ops.plan_lora(torch.from_numpy(places), self.device)


class StepAdapters:
    """What the adapters of one step's tokens add to each projection, in place."""

    def __init__(self, rooms: Mapping[Place, Room], packed: LoraPlan, wanted: LoraPlan) -> None:
        """`packed`: of all tokens of the step; `wanted`: of those whose states are wanted, in their order."""
        self._rooms = rooms
        self._packed = packed
        self._wanted = wanted

    def add(self, layer: int, names: tuple[str, ...], y: Tensor, x: Tensor, *, wanted: bool = False) -> None:
        """The updates of projections whose outputs lie side by side in `y` [T, sum of M], for inputs `x` [T, K]."""
        plan, begin = self._wanted if wanted else self._packed, 0
        for name in names:
            room = self._rooms.get((layer, name))
            if room is None:
                continue
            end = begin + room.b.shape[1]
            ops.lora_add(y[:, begin:end], x, room.a, room.b, room.scales, plan)
            begin = end


def _parts(config: DecoderConfig, shard: TensorShard) -> Iterator[tuple[str, tuple[range, range]]]:
    """Inputs and outputs of each projection that this rank has."""
    dim, hidden = config.head_dim, range(config.hidden_size)
    heads, kv_heads = shard.heads(config.num_heads), shard.kv_heads(config.num_kv_heads)
    columns = shard.columns(config.intermediate_size)
    own = {
        "q_proj": range(heads.start * dim, heads.stop * dim),
        "k_proj": range(kv_heads.start * dim, kv_heads.stop * dim),
        "gate_proj": columns,
    }
    own |= {"v_proj": own["k_proj"], "o_proj": own["q_proj"], "up_proj": columns, "down_proj": columns}
    for name in PROJECTIONS:
        by_input = name in ("o_proj", "down_proj")
        yield name, (own[name], hidden) if by_input else (hidden, own[name])
