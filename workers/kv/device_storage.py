"""The bytes of a worker's KV blocks in a device's memory, with their generations where other processes can see them.

The counterpart of `storage.py` for a worker on a GPU: made by `device_pool.py`, written by the runner's kernels and,
for blocks that arrive, by the transfer thread through `gather` and `scatter`. One more block than the pool knows lies
behind the others: padded rows of a recorded step write there, and nobody reads it. It knows bytes only, neither layouts
nor who owns a block.

Generations live in an ordinary `KVStorage` of one-byte blocks, so that a peer on the same host can map them and check
them around its copy exactly as it does with host memory.

Invariant: the transfer thread's copies run on a stream of their own, which first waits for all device work submitted so
far, and are done when `scatter` or the waiter of `gather` returns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from penstock.workers.errors import ConfigError
from penstock.workers.kv.sliced_pool import HeadSlice
from penstock.workers.kv.storage import KVStorage

_WIDE = 8  # blocks are moved in numbers of so many bytes where they can be


class DeviceKVStorage:
    """`tensor` uint8 [num_blocks + 1, block_bytes] on the device; `generations` uint64 [num_blocks] on the host."""

    def __init__(self, tensor: Tensor, counters: KVStorage) -> None:
        self.tensor = tensor
        self.num_blocks = tensor.shape[0] - 1
        self.block_bytes = tensor.shape[1]
        self._counters = counters
        self._stream = TransferStream(tensor.device)

    @staticmethod
    def create(num_blocks: int, block_bytes: int, device: torch.device) -> DeviceKVStorage:
        """A zeroed storage. Raises ConfigError where the device's memory cannot hold it."""
        if num_blocks < 1 or block_bytes < 1:
            raise ConfigError(f"a KV pool of {num_blocks} blocks of {block_bytes} bytes is empty", key="kv.num_blocks")
        try:
            tensor = torch.zeros((num_blocks + 1, block_bytes), dtype=torch.uint8, device=device)
        except torch.OutOfMemoryError as error:
            size = (num_blocks + 1) * block_bytes >> 20
            raise ConfigError(
                f"the KV pool needs {size} MiB, more than {device} has left; lower kv.num_blocks or "
                "kv.gpu_memory_utilization",
                key="kv.gpu_memory_utilization",
            ) from error
        return DeviceKVStorage(tensor, KVStorage.create(num_blocks, 1))

    @property
    def scratch_block(self) -> int:
        """The block behind the pool's: written by padded rows, read by nobody."""
        return self.num_blocks

    @property
    def generations(self) -> NDArray[np.uint64]:
        """uint64 [num_blocks]; the pool raises a block's number before it is written anew."""
        return self._counters.generations

    @property
    def counters_path(self) -> str:
        """Names the file of the generations for other processes of this host while this one lives."""
        return self._counters.path

    def gather(self, blocks: Sequence[int], buffer: memoryview) -> Callable[[], None]:
        """See `DevicePool.gather`."""
        host = torch.frombuffer(buffer, dtype=torch.uint8, count=len(blocks) * self.block_bytes)
        with self._stream.opened() as done:
            packed = wide(self.tensor).index_select(0, _index(blocks, self.tensor))
            wide(host.view(len(blocks), self.block_bytes)).copy_(packed, non_blocking=True)
        return done

    def scatter(self, buffer: memoryview, places: Sequence[int], blocks: Sequence[int]) -> None:
        """See `DevicePool.scatter`."""
        count = len(buffer) // self.block_bytes
        host = torch.frombuffer(buffer, dtype=torch.uint8, count=count * self.block_bytes).view(count, self.block_bytes)
        with self._stream.opened() as done:
            target = wide(self.tensor)
            if list(places) == list(range(len(places))):  # as a rule, all of them arrived
                arrived = wide(host[: len(places)]).to(target.device, non_blocking=True)
            else:
                arrived = wide(host[list(places)]).to(target.device)
            target.index_copy_(0, _index(blocks, self.tensor), arrived)
        done()

    def pack(self, blocks: Sequence[int]) -> Tensor:
        """See `transfer.lane_frames.PackedPool.pack`."""
        with self._stream.opened() as done:
            packed = wide(self.tensor).index_select(0, _index(blocks, self.tensor)).view(torch.uint8)
        done()
        return packed

    def unpack(self, frame: Tensor, places: Sequence[int], blocks: Sequence[int]) -> None:
        """See `transfer.lane_frames.PackedPool.unpack`."""
        with self._stream.opened() as done:
            arrived = wide(frame).index_select(0, _index(places, frame))
            wide(self.tensor).index_copy_(0, _index(blocks, self.tensor), arrived)
        done()

    def slice_pool(self, part: HeadSlice) -> DeviceSlices:
        """The same blocks, of which peers see some of the heads only."""
        return DeviceSlices(self, part, self._stream)

    def copy_from(self, source: Tensor, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy blocks of another pool on this device; they are there when this returns."""
        with self._stream.opened() as done:
            taken = wide(source).index_select(0, _index(sources, self.tensor))
            wide(self.tensor).index_copy_(0, _index(targets, self.tensor), taken)
        done()

    def close(self) -> None:
        """Give the memory back once the last view of it is gone. Safe to call twice."""
        self.tensor = torch.zeros((1, self.block_bytes), dtype=torch.uint8)
        self._counters.close()


class DeviceSlices:
    """`transfer.port.DevicePool` over some of the heads of every block; see `sliced_pool.py` for their order."""

    def __init__(self, storage: DeviceKVStorage, part: HeadSlice, stream: TransferStream) -> None:
        self.num_blocks = storage.num_blocks
        self.block_bytes = part.bytes_of(storage.block_bytes)
        self._storage = storage
        self._part = part
        self._stream = stream

    @property
    def generations(self) -> NDArray[np.uint64]:
        """The storage's."""
        return self._storage.generations

    def gather(self, blocks: Sequence[int], buffer: memoryview) -> Callable[[], None]:
        """See `DevicePool.gather`."""
        host = torch.frombuffer(buffer, dtype=torch.uint8, count=len(blocks) * self.block_bytes)
        with self._stream.opened() as done:
            packed = self._rows().index_select(0, _index(blocks, self._storage.tensor))
            host.copy_(packed.reshape(-1), non_blocking=True)
        return done

    def scatter(self, buffer: memoryview, places: Sequence[int], blocks: Sequence[int]) -> None:
        """See `DevicePool.scatter`."""
        count = len(buffer) // self.block_bytes
        host = torch.frombuffer(buffer, dtype=torch.uint8, count=count * self.block_bytes).view(count, self.block_bytes)
        with self._stream.opened() as done:
            rows = self._rows()
            arrived = host[list(places)].to(rows.device).view(len(places), *rows.shape[1:])
            rows.index_copy_(0, _index(blocks, self._storage.tensor), arrived)
        done()

    def pack(self, blocks: Sequence[int]) -> Tensor:
        """See `transfer.lane_frames.PackedPool.pack`."""
        with self._stream.opened() as done:
            packed = self._rows().index_select(0, _index(blocks, self._storage.tensor))
        done()
        return packed.view(len(blocks), self.block_bytes)

    def unpack(self, frame: Tensor, places: Sequence[int], blocks: Sequence[int]) -> None:
        """See `transfer.lane_frames.PackedPool.unpack`."""
        with self._stream.opened() as done:
            rows = self._rows()
            arrived = frame.index_select(0, _index(places, frame)).view(len(places), *rows.shape[1:])
            rows.index_copy_(0, _index(blocks, self._storage.tensor), arrived)
        done()

    def _rows(self) -> Tensor:
        """[block, piece, head, byte] of the slice; shares the pool's memory."""
        tensor, part = self._storage.tensor, self._part
        rows = tensor.view(len(tensor), part.pieces, part.heads, -1)
        return rows[:, :, part.first : part.first + part.count]


class TransferStream:
    """Where the transfer thread's copies run; on the CPU, at once."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    @contextmanager
    def opened(self) -> Iterator[Callable[[], None]]:
        """Work inside comes after all that was submitted so far; the call yielded waits for it, once outside."""
        with torch.inference_mode():
            if self._stream is None:
                yield lambda: None  # on the CPU everything is done when a call returns
                return
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._stream.wait_stream(torch.cuda.default_stream(self._device))
            with torch.cuda.stream(self._stream):
                yield event.synchronize
                event.record(self._stream)


def wide(rows: Tensor) -> Tensor:
    """The same rows [n, bytes] in numbers of 8 bytes where they can be: indexing moves one number per thread."""
    return rows.view(torch.int64) if rows.shape[1] % _WIDE == 0 else rows


def _index(blocks: Sequence[int], like: Tensor) -> Tensor:
    return torch.tensor(blocks, dtype=torch.int64, device=like.device)
