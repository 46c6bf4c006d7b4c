"""Adapters of a worker whose ranks share the layers: rank 0 reads them and gives every rank all it may need.

Rank 0 fills places through `GroupAdapters`, in order with the plans of steps, so that every rank computes a step
with the same adapters; a follower calls `put_update` for each message. Followers need no files: what was checked once
is what all compute with. Legend: R rank, K inputs, M outputs.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from penstock.workers.errors import ConfigError, WireError
from penstock.workers.lora.bank import AdapterBank
from penstock.workers.lora.weights import HostAdapter, Update
from penstock.workers.parallel.group_messages import MAX_MESSAGE_BYTES, GroupMessage, PutUpdate

_HEAD_BYTES = 4096  # of a message, beside its matrices
_NOTHING = np.zeros(0, np.uint8)


class GroupAdapters:
    """Rank 0's bank and, through `send`, those of the others; see `lora.store.Bank`."""

    def __init__(self, own: AdapterBank, send: Callable[[GroupMessage], object]) -> None:
        """Raises ConfigError where the largest update would be too large for a message."""
        largest = max(size.inputs + size.outputs for size in own.sizes.values())
        most = (MAX_MESSAGE_BYTES - _HEAD_BYTES) // (largest * own.dtype.itemsize)
        if own.max_rank > most:
            raise ConfigError(f"max_rank {own.max_rank}: ranks of a group take at most {most}", "adapters.max_rank")
        self._own = own
        self._send = send

    @property
    def num_places(self) -> int:
        """On every rank."""
        return self._own.num_places

    def put(self, place: int, adapter: HostAdapter) -> None:
        """Fill the place on every rank."""
        for layer, name in self._own.sizes:
            update = adapter.updates.get((layer, name))
            if update is None:
                self._send(PutUpdate(place, layer, name, 0, 0.0, _NOTHING, _NOTHING))
            else:
                a, b = _bytes(update.a, self._own.dtype), _bytes(update.b, self._own.dtype)
                self._send(PutUpdate(place, layer, name, len(update.a), update.scale, a, b))
        self._own.put(place, adapter)


def put_update(bank: AdapterBank | None, message: PutUpdate) -> None:
    """A follower's part. Raises WireError where the message does not fit the bank."""
    where = message.layer, message.projection
    size = None if bank is None else bank.sizes.get(where)
    if bank is None or size is None or message.place >= bank.num_places or message.rank > bank.max_rank:
        raise WireError("PutUpdate: for no place that this rank has")
    update = None
    if message.rank:
        a = _tensor(message.a, (message.rank, size.inputs), bank.dtype)
        update = Update(a, _tensor(message.b, (size.outputs, message.rank), bank.dtype), message.scale)
    bank.put_update(message.place, where, update)


def _bytes(matrix: Tensor, dtype: torch.dtype) -> NDArray[np.uint8]:
    data: NDArray[np.uint8] = matrix.to(dtype).contiguous().view(torch.uint8).numpy().reshape(-1)
    return data


def _tensor(data: NDArray[np.uint8], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    if len(data) != shape[0] * shape[1] * dtype.itemsize:
        raise WireError(f"PutUpdate: {len(data)} bytes are no matrix of {shape[0]} x {shape[1]}")
    return torch.from_numpy(data.copy()).view(dtype).view(shape)
