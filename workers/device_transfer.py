"""The KV pool of a worker on a GPU as the transfer thread wants it.

Called by the worker's assembly. To peers elsewhere, blocks are staged through page-locked host buffers: two outgoing
ones, so that one is gathered while the other is on the wire, and a few incoming ones for peers that deliver at once. A
peer on the same card maps this pool by the file that names it, and copies for itself. It does not know sessions or the
wire.
"""

from __future__ import annotations

import logging
import os

import numpy as np
import torch
from numpy.typing import NDArray

from penstock.workers.kv.device_segment import PeerPool, describe, publish
from penstock.workers.kv.device_storage import DeviceKVStorage, DeviceSlices
from penstock.workers.kv.sliced_pool import HeadSlice
from penstock.workers.kv.storage import KVStorage
from penstock.workers.transfer.staging import StagedStorage

logger = logging.getLogger(__name__)

_BUFFER_BYTES = 8 << 20
_NUM_OUTGOING, _NUM_INCOMING = 2, 4


class CardStorage(StagedStorage):
    """`transfer.port.BlockStorage` over a pool on a GPU; buffers of 8 MiB, or of one block where that is larger."""

    def __init__(self, storage: DeviceKVStorage) -> None:
        size = max(_BUFFER_BYTES, storage.block_bytes)
        on_gpu = storage.tensor.device.type == "cuda"
        buffers = [_host_buffer(size, pinned=on_gpu) for _ in range(_NUM_OUTGOING + _NUM_INCOMING)]
        super().__init__(storage, buffers[:_NUM_OUTGOING], buffers[_NUM_OUTGOING:])
        self._storage = storage
        self._segment = _published(storage) if on_gpu else ""

    @property
    def segment(self) -> str:
        """The file by which a process on the same card maps this pool; empty where the driver lends no handle."""
        return self._segment

    @property
    def copies_on_device(self) -> bool:
        """A peer on the same card does."""
        return True

    def beside(self) -> StagedStorage:
        """The same pool through buffers of their own, for one more thread that reads and writes it."""
        pinned = self.device.type == "cuda"
        out, back = (_host_buffer(self.frame_bytes or self.block_bytes, pinned=pinned) for _ in range(2))
        return StagedStorage(self._storage, [out], [back])

    @property
    def device(self) -> torch.device:
        """Where the blocks are."""
        return self._storage.tensor.device

    def packed_pool(self, part: HeadSlice | None) -> DeviceKVStorage | DeviceSlices:
        """See `transfer.lane_frames.PackingStorage`."""
        return self._storage if part is None else self._storage.slice_pool(part)

    def slice_pool(self, part: HeadSlice) -> DeviceSlices:
        """See `BlockStorage.slice_pool`."""
        return self._storage.slice_pool(part)

    def attach(self, path: str) -> PeerPool | KVStorage:
        """The pool that the file names: mapped where it is on this card, else in host memory. OSError, WireError."""
        device = self._storage.tensor.device
        peer = PeerPool.attach(path, self._storage) if device.type == "cuda" else None
        return peer if peer is not None else KVStorage.attach(path)


def _host_buffer(size: int, *, pinned: bool) -> memoryview:
    data: NDArray[np.uint8] = torch.zeros(size, dtype=torch.uint8, pin_memory=pinned).numpy()
    return data.data


def _published(storage: DeviceKVStorage) -> str:
    try:
        return f"/proc/{os.getpid()}/fd/{publish(describe(storage))}"
    except RuntimeError as error:  # some containers and virtual cards forbid it
        logger.warning("the KV pool cannot be shared on its card, peers get it by TCP: %s", error)
        return ""
