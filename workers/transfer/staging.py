"""Blocks that the CPU cannot address, sent and received through a few host buffers: a device's pool as `BlockStorage`.

Built by whoever owns a pool on a device, given to `TransferEngine` as its storage; used on the transfer thread only.
Knows buffers and when they are free; how bytes get to the device and back is `DevicePool`'s. With two outgoing buffers
or more, one is gathered while the other is on the wire; with an incoming one for each connection that delivers at
once, nobody waits. Incoming and outgoing buffers are apart, so that two workers that send to each other cannot block
each other.

Invariants: a buffer is lent to one reading or landing at a time; blocks of a pool are written by `commit` only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from penstock.workers.errors import ConfigError
from penstock.workers.kv.storage import KVStorage
from penstock.workers.transfer.port import DevicePool, DirectPeerPool, HostPeerPool

_SLICE_BUFFER_BYTES = 4 << 20
_NUM_OUTGOING, _NUM_INCOMING = 2, 4


class StagedStorage:
    """`BlockStorage` over a `DevicePool`; every buffer holds `frame_bytes`. Raises ConfigError if no block fits."""

    def __init__(self, pool: DevicePool, outgoing: Sequence[memoryview], incoming: Sequence[memoryview]) -> None:
        self.num_blocks = pool.num_blocks
        self.block_bytes = pool.block_bytes
        self._pool = pool
        self._outgoing, self._incoming = list(outgoing), list(incoming)
        room = min((len(buffer) for buffer in (*outgoing, *incoming)), default=0)
        if not outgoing or not incoming or room < self.block_bytes:
            raise ConfigError(
                f"staging needs buffers of at least one block ({self.block_bytes} bytes) in both directions",
                key="transfer",
            )
        self.frame_bytes: int | None = room - room % self.block_bytes

    @property
    def generations(self) -> NDArray[np.uint64]:
        """The pool's."""
        return self._pool.generations

    @property
    def segment(self) -> str:
        """None: other processes cannot map this memory."""
        return ""

    @property
    def copies_on_device(self) -> bool:
        """Nobody maps this memory."""
        return False

    def attach(self, path: str) -> HostPeerPool | DirectPeerPool:
        """A peer's pool in host memory."""
        return KVStorage.attach(path)

    def read(self, blocks: Sequence[int]) -> StagedBlocks | None:
        """Begin to gather these blocks; None while every outgoing buffer is lent."""
        if not self._outgoing:
            return None
        buffer = self._outgoing.pop()
        return StagedBlocks(self._pool, buffer, blocks, self._outgoing.append, self._pool.gather(blocks, buffer))

    def land(self, blocks: Sequence[int]) -> StagedBlocks | None:
        """A buffer for what is to come into these blocks; None while every incoming one is lent."""
        if not self._incoming:
            return None
        return StagedBlocks(self._pool, self._incoming.pop(), blocks, self._incoming.append, None)


def staged_slices(pool: DevicePool) -> StagedStorage:
    """Slices of blocks for peers of another width, packed in buffers of ordinary memory."""
    size = max(_SLICE_BUFFER_BYTES, pool.block_bytes)
    buffers = [memoryview(bytearray(size)) for _ in range(_NUM_OUTGOING + _NUM_INCOMING)]
    return StagedStorage(pool, buffers[:_NUM_OUTGOING], buffers[_NUM_OUTGOING:])


class StagedBlocks:
    """`HostBlocks` in a lent buffer, which `give_back` takes again."""

    __slots__ = ("_buffer", "_give_back", "_numbers", "_pool", "_wait")

    def __init__(
        self,
        pool: DevicePool,
        buffer: memoryview,
        numbers: Sequence[int],
        give_back: Callable[[memoryview], None],
        wait: Callable[[], None] | None,
    ) -> None:
        self._pool = pool
        self._buffer: memoryview | None = buffer
        self._numbers = numbers
        self._give_back = give_back
        self._wait = wait

    @property
    def blocks(self) -> list[memoryview]:
        """One view per block."""
        whole, size = self._filled(), self._pool.block_bytes
        return [whole[at : at + size] for at in range(0, len(whole), size)]

    @property
    def runs(self) -> list[memoryview]:
        """The used part of the buffer."""
        return [self._filled()] if self._numbers else []

    def commit(self, places: Sequence[int]) -> None:
        """Copy the blocks at these places into the pool."""
        if places and self._buffer is not None:
            self._pool.scatter(self._buffer, places, [self._numbers[place] for place in places])

    def release(self) -> None:
        """Give the buffer back; a gather under way is waited for, as it still writes there."""
        if self._buffer is not None:
            self._done()
            buffer, self._buffer = self._buffer, None
            self._give_back(buffer)

    def _filled(self) -> memoryview:
        self._done()
        if self._buffer is None:
            return memoryview(b"")
        return self._buffer[: len(self._numbers) * self._pool.block_bytes]

    def _done(self) -> None:
        if self._wait is not None:
            self._wait()
            self._wait = None
