"""A device's KV pool as other processes on the same card can map it: a small file that names it, and the mapping.

Made by the owner's assembly and opened by the transfer's receiving side; the path of the file takes the place of that
of a host pool. The file holds sizes, the card's identity and the driver's handle of the memory, as plain bytes with
lengths: nothing in it is executed or unpickled. Blocks are copied from one pool to the other by the card itself.
Generations are checked around the copy by who asks for it, just as for a pool in host memory.

    header (64 bytes) | uuid | path of the generations | handles
"""

from __future__ import annotations

import fcntl
import os
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from penstock.workers.errors import WireError
from penstock.workers.kv.device_storage import DeviceKVStorage
from penstock.workers.kv.storage import KVStorage

MAGIC = b"PSTKDV01"
_HEADER = struct.Struct("<8sQQHHHHHHQQQ?")  # see _pack
_HEADER_BYTES = 64
_MAX_PART = 4096
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
_COUNTERS_PATH = re.compile(r"/proc/[1-9][0-9]*/fd/[0-9]+")


@dataclass(frozen=True, slots=True)
class MemoryHandle:
    """What the driver needs to map another process's memory; the parts that torch's storages exchange."""

    handle: bytes
    size_bytes: int
    offset_bytes: int
    counter: bytes
    counter_offset: int
    event: bytes
    event_needed: bool

    @staticmethod
    def of(tensor: Tensor) -> MemoryHandle:
        """The handle of a tensor's memory on a GPU."""
        shared: Any = tensor.untyped_storage()._share_cuda_()  # type: ignore[no-untyped-call]
        _, handle, size, offset, counter, counter_offset, event, needed = shared
        return MemoryHandle(handle, size, offset, counter, counter_offset, event, needed)

    def open(self, device: torch.device) -> Tensor:
        """The memory as uint8 [size] on `device`, which must be the same card. Raises RuntimeError where it is gone."""
        shared: Any = torch.UntypedStorage._new_shared_cuda(
            device.index,
            self.handle,
            self.size_bytes,
            self.offset_bytes,
            self.counter,
            self.counter_offset,
            self.event,
            self.event_needed,
        )
        return torch.empty(0, dtype=torch.uint8, device=device).set_(shared)


@dataclass(frozen=True, slots=True)
class PoolDescription:
    """What the file says."""

    num_blocks: int
    block_bytes: int
    card: bytes  # the same in every process, whatever number the card has there
    counters_path: str
    memory: MemoryHandle


def card_of(device: torch.device) -> bytes:
    """The identity of a GPU."""
    return str(torch.cuda.get_device_properties(device).uuid).encode()


def publish(description: PoolDescription) -> int:
    """Write a sealed memory file; its descriptor, under which /proc/<pid>/fd names it."""
    descriptor = os.memfd_create("penstock-kv-device", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.write(descriptor, _pack(description))
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
    return descriptor


def describe(storage: DeviceKVStorage) -> PoolDescription:
    """The description of a pool on a GPU."""
    return PoolDescription(
        storage.num_blocks,
        storage.block_bytes,
        card_of(storage.tensor.device),
        storage.counters_path,
        MemoryHandle.of(storage.tensor),
    )


def read_description(path: str) -> PoolDescription | None:
    """What the file at `path` says; None where it is no such file. Raises OSError, or WireError for a damaged one."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.fstat(descriptor).st_size
        if os.pread(descriptor, len(MAGIC), 0) != MAGIC:
            return None
        if size > _HEADER_BYTES + 6 * _MAX_PART:
            raise WireError(f"{path} is no KV pool on a device: {size} bytes")
        return _unpack(os.pread(descriptor, size, 0), path)
    finally:
        os.close(descriptor)


class PeerPool:
    """Another process's pool on this card, mapped: `transfer.port.DirectPeer` for `storage`."""

    def __init__(self, memory: Tensor, counters: KVStorage, storage: DeviceKVStorage) -> None:
        """`memory` uint8 [at least num_blocks * block_bytes]; `storage` is where copies go."""
        self.num_blocks = counters.num_blocks
        self.block_bytes = storage.block_bytes
        self._blocks = memory[: self.num_blocks * self.block_bytes].view(self.num_blocks, self.block_bytes)
        self._counters = counters
        self._storage = storage

    @staticmethod
    def attach(path: str, storage: DeviceKVStorage) -> PeerPool | None:
        """Map the pool that `path` names; None where that is no pool of this card. Raises OSError and WireError."""
        device, found = storage.tensor.device, read_description(path)
        if found is None or found.card != card_of(device):
            return None
        if not _COUNTERS_PATH.fullmatch(found.counters_path) or found.block_bytes != storage.block_bytes:
            raise WireError(f"{path}: its generations or its blocks are not those of a peer")
        counters = KVStorage.attach(found.counters_path)
        if counters.num_blocks != found.num_blocks:
            raise WireError(f"{path}: {counters.num_blocks} generations for {found.num_blocks} blocks")
        try:
            memory = found.memory.open(device)
        except RuntimeError as error:
            raise WireError(f"{path}: its memory cannot be mapped: {error}") from error
        if memory.numel() < found.num_blocks * found.block_bytes:
            raise WireError(f"{path}: {memory.numel()} bytes do not hold its blocks")
        return PeerPool(memory, counters, storage)

    @property
    def generations(self) -> NDArray[np.uint64]:
        """The owner's, as they are now."""
        return self._counters.generations

    def copy(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy the owner's blocks into ours; they are there when this returns. The caller checks generations."""
        self._storage.copy_from(self._blocks, sources, targets)

    def close(self) -> None:
        """Unmap. Safe to call twice."""
        self._blocks = self._blocks[:0].clone()
        self._counters.close()


def _pack(description: PoolDescription) -> bytes:
    memory, path = description.memory, description.counters_path.encode()
    parts = (description.card, path, memory.handle, memory.counter, memory.event)
    header = _HEADER.pack(
        MAGIC,
        description.num_blocks,
        description.block_bytes,
        *map(len, parts),
        0,
        memory.size_bytes,
        memory.offset_bytes,
        memory.counter_offset,
        memory.event_needed,
    )
    return header.ljust(_HEADER_BYTES, b"\0") + b"".join(parts)


def _unpack(raw: bytes, path: str) -> PoolDescription:
    if len(raw) < _HEADER_BYTES:
        raise WireError(f"{path} is no KV pool on a device: too short")
    _, num_blocks, block_bytes, *rest = _HEADER.unpack_from(raw)
    lengths, (size, offset, counter_offset, needed) = rest[:5], rest[6:]
    if num_blocks < 1 or block_bytes < 1 or _HEADER_BYTES + sum(lengths) != len(raw) or max(lengths) > _MAX_PART:
        raise WireError(f"{path} is no KV pool on a device: its header does not match its size")
    parts, begin = [], _HEADER_BYTES
    for length in lengths:
        parts.append(raw[begin : begin + length])
        begin += length
    card, counters, handle, counter, event = parts
    try:
        name = counters.decode("ascii")
    except UnicodeDecodeError as error:
        raise WireError(f"{path}: the path of its generations is none") from error
    memory = MemoryHandle(handle, size, offset, counter, counter_offset, event, needed)
    return PoolDescription(num_blocks, block_bytes, card, name, memory)
