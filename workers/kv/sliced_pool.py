"""Some of the KV heads of every block of a pool, packed: what travels between groups of different widths.

Made by a pool's `slice_pool` and by the transfer over a peer's segment; `transfer/staging.py` lends the buffers.
A block is `pieces` runs of bytes (one per layer and part), each with its heads one after the other; the packed slice
keeps that order. Knows bytes, neither sessions nor who else has which heads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from penstock.workers.errors import IntegrityError, WireError


@dataclass(frozen=True, slots=True)
class HeadSlice:
    """Heads `[first, first + count)` of the `heads` in a block, numbered within the block; `pieces` runs hold each."""

    pieces: int
    heads: int
    first: int
    count: int

    def bytes_of(self, block_bytes: int) -> int:
        """Bytes of the slice of a block. Raises WireError for a block that cannot hold such runs and heads."""
        if block_bytes % (self.pieces * self.heads):
            raise WireError(f"a KV block of {block_bytes} bytes has no {self.pieces} runs of {self.heads} heads")
        return block_bytes // self.heads * self.count


class PackedBlocks:
    """`transfer.port.HostBlocks` in memory of its own: packed slices, read once."""

    def __init__(self, data: memoryview, block_bytes: int) -> None:
        self._data = data
        self._block_bytes = block_bytes

    @property
    def blocks(self) -> list[memoryview]:
        """One view per block."""
        return [self._data[at : at + self._block_bytes] for at in range(0, len(self._data), self._block_bytes)]

    @property
    def runs(self) -> list[memoryview]:
        """All of them."""
        return [self._data] if self._data else []

    def commit(self, places: Sequence[int]) -> None:
        """Nothing arrives here. Raises IntegrityError."""
        raise IntegrityError(f"blocks {places} of a peer's pool were to be written")

    def release(self) -> None:
        """Let go of the memory."""
        self._data = memoryview(b"")


class SlicedPool:
    """`staging.DevicePool` over host memory: `data` uint8 [num_blocks, bytes of a whole block]."""

    def __init__(self, data: NDArray[np.uint8], generations: NDArray[np.uint64], part: HeadSlice) -> None:
        self.num_blocks, whole = data.shape
        self.block_bytes = part.bytes_of(whole)
        self.generations = generations
        head_bytes = whole // (part.pieces * part.heads)
        rows = data.reshape(self.num_blocks, part.pieces, part.heads, head_bytes)
        self._rows = rows[:, :, part.first : part.first + part.count]  # [block, piece, head, byte]; shares the memory

    def gather(self, blocks: Sequence[int], buffer: memoryview) -> Callable[[], None]:
        """See `DevicePool.gather`; the bytes are there when this returns."""
        packed = self._packed(buffer, len(blocks))
        for place, block in enumerate(blocks):
            np.copyto(packed[place], self._rows[block])
        return lambda: None

    def scatter(self, buffer: memoryview, places: Sequence[int], blocks: Sequence[int]) -> None:
        """See `DevicePool.scatter`."""
        packed = self._packed(buffer, len(buffer) // self.block_bytes)
        for place, block in zip(places, blocks, strict=True):
            np.copyto(self._rows[block], packed[place])

    def read(self, blocks: Sequence[int]) -> PackedBlocks:
        """The slices of these blocks as they are now, copied."""
        buffer = memoryview(bytearray(len(blocks) * self.block_bytes))
        self.gather(blocks, buffer)
        return PackedBlocks(buffer, self.block_bytes)

    def _packed(self, buffer: memoryview, count: int) -> NDArray[np.uint8]:
        flat = np.frombuffer(buffer, np.uint8, count * self.block_bytes)
        return flat.reshape(count, *self._rows.shape[1:])
