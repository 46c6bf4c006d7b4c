"""A pool of blocks that the CPU cannot address: a device without a device. Bytes are held as their complement."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from penstock.workers.transfer.staging import StagedStorage


class OpaquePool:
    """`DevicePool`; a gather fills its buffer only when it is waited for, as one under way on a device would."""

    def __init__(self, num_blocks: int, block_bytes: int) -> None:
        self.num_blocks, self.block_bytes = num_blocks, block_bytes
        self.generations = np.zeros(num_blocks, np.uint64)
        self._secret = np.full((num_blocks, block_bytes), 0xFF, np.uint8)
        self.gathers_under_way = self.most_under_way = 0

    @property
    def content(self) -> np.ndarray:
        """A copy of all bytes, for tests."""
        return ~self._secret

    def write(self, blocks: Sequence[int], content: np.ndarray) -> None:
        """What the runner's kernels would do."""
        self._secret[list(blocks)] = ~content

    def gather(self, blocks: Sequence[int], buffer: memoryview) -> Callable[[], None]:
        self.gathers_under_way += 1
        self.most_under_way = max(self.most_under_way, self.gathers_under_way)

        def wait() -> None:
            self.gathers_under_way -= 1
            content = np.ascontiguousarray(~self._secret[list(blocks)])
            buffer[: content.nbytes] = memoryview(content.reshape(-1))

        return wait

    def scatter(self, buffer: memoryview, places: Sequence[int], blocks: Sequence[int]) -> None:
        rows = np.frombuffer(buffer, np.uint8)[: len(buffer) - len(buffer) % self.block_bytes]
        self._secret[list(blocks)] = ~rows.reshape(-1, self.block_bytes)[list(places)]


def staged(pool: OpaquePool, outgoing: int = 2, incoming: int = 1, blocks: int = 2) -> StagedStorage:
    """The pool with so many buffers of so many blocks."""
    size = blocks * pool.block_bytes
    make = lambda count: [memoryview(bytearray(size)) for _ in range(count)]  # noqa: E731
    return StagedStorage(pool, make(outgoing), make(incoming))
