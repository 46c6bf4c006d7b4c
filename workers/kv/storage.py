"""The bytes of a worker's KV blocks: one memory file that other processes of the same host can open read-only.

Created by the worker process; the runner and the transfer thread write through `data`, the block pool bumps
`generations`. A prefill worker's storage is attached by decode workers that copy blocks out of it. The module knows
bytes only, neither layouts nor who owns a block.

The file is anonymous (memfd): it lives as long as some process holds it, so a killed worker leaves nothing behind.
Invariant: its size is sealed, so an attached reader can never be hit by a truncation (SIGBUS).

    header (64 bytes) | generations uint64 [num_blocks] | padding | data uint8 [num_blocks, block_bytes]

The data starts on a page of its own, chosen so that the owner's map of it can be of huge pages: they make a copy, and
every other long read, faster by a tenth to a third.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import psutil
from numpy.typing import NDArray

from penstock.workers.errors import ConfigError, WireError
from penstock.workers.kv.sliced_pool import HeadSlice, SlicedPool

_MAGIC = b"PSTKKV01"
_HEADER = struct.Struct("<8sQQQ")  # magic, num_blocks, block_bytes, offset of data
_ALIGN = 64
_PAGE = mmap.ALLOCATIONGRANULARITY
_HUGE_PAGE = 2 << 20
# Advice that the mmap module of Python 3.11 does not name.
_POPULATE_WRITE = 23
_COLLAPSE = 25
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


class KVStorage:
    """One worker's KV bytes. `data` uint8 [num_blocks, block_bytes]; `generations` uint64 [num_blocks].

    `path` names the file for other processes of this host while this one lives. Build it with `create` or `attach`.
    """

    def __init__(self, descriptor: int, num_blocks: int, block_bytes: int, offset: int, *, writable: bool) -> None:
        access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ
        self._descriptor = descriptor
        self._head = mmap.mmap(descriptor, _head_bytes(num_blocks), access=access)
        self._map = mmap.mmap(descriptor, num_blocks * block_bytes, access=access, offset=offset)
        if writable:
            _touch(self._head)
            _touch(self._map)
        self.num_blocks = num_blocks
        self.block_bytes = block_bytes
        self.path = f"/proc/{os.getpid()}/fd/{descriptor}"
        self.generations: NDArray[np.uint64] = np.frombuffer(self._head, np.uint64, num_blocks, _ALIGN)
        flat = np.frombuffer(self._map, np.uint8, num_blocks * block_bytes)
        self.data: NDArray[np.uint8] = flat.reshape(num_blocks, block_bytes)
        self._bytes = memoryview(flat.data)

    @property
    def segment(self) -> str:
        """The file that peers on this host copy blocks from."""
        return self.path

    @property
    def copies_on_device(self) -> bool:
        """Peers copy for themselves, through the host."""
        return False

    @property
    def frame_bytes(self) -> int | None:
        """`read` and `land` take any number of blocks."""
        return None

    def read(self, blocks: Sequence[int]) -> PoolBlocks:
        """The bytes of these blocks where they lie."""
        return PoolBlocks(self._bytes, self.block_bytes, blocks)

    def land(self, blocks: Sequence[int]) -> PoolBlocks:
        """The memory of these blocks, to be written in place."""
        return PoolBlocks(self._bytes, self.block_bytes, blocks)

    def slice_pool(self, part: HeadSlice) -> SlicedPool:
        """The same blocks, of which peers see some of the heads only."""
        return SlicedPool(self.data, self.generations, part)

    @staticmethod
    def create(num_blocks: int, block_bytes: int) -> KVStorage:
        """A zeroed storage that this process owns. Raises ConfigError where the host's memory cannot hold it."""
        if num_blocks < 1 or block_bytes < 1:
            raise ConfigError(f"a KV pool of {num_blocks} blocks of {block_bytes} bytes is empty", key="kv.num_blocks")
        size = _head_bytes(num_blocks) + num_blocks * block_bytes
        available = available_bytes()
        if size > available:
            raise ConfigError(
                f"the KV pool needs {size >> 20} MiB and {available >> 20} MiB are available; lower "
                "--kv-cache-memory-bytes or --num-gpu-blocks-override",
                key="kv.memory_bytes",
            )
        descriptor = os.memfd_create("penstock-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            offset = _data_offset(descriptor, num_blocks, block_bytes)
            os.ftruncate(descriptor, offset + num_blocks * block_bytes)
            os.pwrite(descriptor, _HEADER.pack(_MAGIC, num_blocks, block_bytes, offset), 0)
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
            return KVStorage(descriptor, num_blocks, block_bytes, offset, writable=True)
        except OSError as error:
            os.close(descriptor)
            raise ConfigError(f"the KV pool of {size >> 20} MiB cannot be mapped: {error}", key="kv") from error

    @staticmethod
    def attach(path: str) -> KVStorage:
        """Another process's storage, read-only. OSError: it cannot be opened; WireError: it is no KV storage."""
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            num_blocks, block_bytes, offset = _read_header(descriptor, path)
            return KVStorage(descriptor, num_blocks, block_bytes, offset, writable=False)
        except (OSError, WireError):
            os.close(descriptor)
            raise

    def close(self) -> None:
        """Give the descriptor back. The memory goes once the last view of it is gone. Safe to call twice."""
        if self._descriptor < 0:
            return
        self._bytes = memoryview(b"")
        self.data = np.zeros((0, self.block_bytes), np.uint8)
        self.generations = np.zeros(0, np.uint64)
        # A runner may still hold a view: then the map closes with it, not here.
        for mapped in (self._head, self._map):
            with contextlib.suppress(BufferError):
                mapped.close()
        os.close(self._descriptor)
        self._descriptor = -1


class PoolBlocks:
    """Some blocks of a pool in host memory: `HostBlocks` of the transfer without any copy."""

    __slots__ = ("_block_bytes", "_bytes", "_numbers")

    def __init__(self, pool: memoryview, block_bytes: int, numbers: Sequence[int]) -> None:
        self._bytes = pool
        self._block_bytes = block_bytes
        self._numbers = numbers

    @property
    def blocks(self) -> list[memoryview]:
        """One view per block."""
        pool, size = self._bytes, self._block_bytes
        return [pool[number * size : (number + 1) * size] for number in self._numbers]

    @property
    def runs(self) -> list[memoryview]:
        """One view per run of consecutive blocks."""
        pool, size, numbers = self._bytes, self._block_bytes, self._numbers
        runs: list[memoryview] = []
        first = 0
        for place in range(1, len(numbers) + 1):
            if place == len(numbers) or numbers[place] != numbers[place - 1] + 1:
                runs.append(pool[numbers[first] * size : (numbers[place - 1] + 1) * size])
                first = place
        return runs

    def commit(self, places: Sequence[int]) -> None:
        """The bytes were written where they belong; only places that were asked for can be meant. Raises IndexError."""
        if any(not 0 <= place < len(self._numbers) for place in places):
            raise IndexError(f"places {places} of {len(self._numbers)} blocks")

    def release(self) -> None:
        """Name no block any more; the memory is the pool's."""
        self._numbers = ()


def _head_bytes(num_blocks: int) -> int:
    """Size of header and generations, in whole pages."""
    return -(-(_ALIGN + 8 * num_blocks) // _PAGE) * _PAGE


def _data_offset(descriptor: int, num_blocks: int, block_bytes: int) -> int:
    """Where in the file the data should start. Leaves the file at some size that is large enough.

    Huge pages need an address and a position in the file that agree modulo their size. The address of a map is the
    system's choice, but it will most probably make the same choice again: so look at it, and choose the position. If
    it does not, the pages are small, and everything works as well.
    """
    first, size = _head_bytes(num_blocks), num_blocks * block_bytes
    os.ftruncate(descriptor, first + size)
    if size < _HUGE_PAGE:
        return first
    with mmap.mmap(descriptor, size, offset=first) as probe:
        address = int(np.frombuffer(probe, np.uint8, 1).__array_interface__["data"][0])
    return first + (address - first) % _HUGE_PAGE


def _touch(mapped: mmap.mmap) -> None:
    """Have every page now, huge ones where possible: a shortage shows at start, and no transfer pays for faults later.

    Kernels before 6.1 do not know how to collapse, and those before 5.14 fault on first use as ever.
    """
    if len(mapped) >= _HUGE_PAGE:
        np.frombuffer(mapped, np.uint8)[::_HUGE_PAGE] = 0  # a range without any page is not collapsed
        # Refused, or no huge page to be had: small ones will do.
        with contextlib.suppress(OSError):
            mapped.madvise(_COLLAPSE)
    try:
        mapped.madvise(_POPULATE_WRITE)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise


def _read_header(descriptor: int, path: str) -> tuple[int, int, int]:
    """(num_blocks, block_bytes, offset of the data) of a foreign file; that it can be mapped and read is checked."""
    size = os.fstat(descriptor).st_size
    raw = os.pread(descriptor, _HEADER.size, 0)
    if len(raw) != _HEADER.size:
        raise WireError(f"{path} is no KV storage: too short")
    magic, num_blocks, block_bytes, offset = _HEADER.unpack(raw)
    if magic != _MAGIC or num_blocks < 1 or block_bytes < 1 or not _fits(num_blocks, block_bytes, offset, size):
        raise WireError(f"{path} is no KV storage: its header does not match its size")
    try:
        seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
    except OSError as error:
        raise WireError(f"{path} is no KV storage: not a memory file") from error
    if seals & _SEALS != _SEALS:
        raise WireError(f"{path} is no KV storage: its size is not sealed")
    return num_blocks, block_bytes, offset


def _fits(num_blocks: int, block_bytes: int, offset: int, size: int) -> bool:
    """A file of this size has room for all that its header speaks of, and nothing else."""
    aligned = offset % _PAGE == 0 and 0 <= offset - _head_bytes(num_blocks) < _HUGE_PAGE
    return aligned and size == offset + num_blocks * block_bytes


def available_bytes() -> int:
    """Memory this process may still take: the host's, or its control group's where that is less."""
    available = int(psutil.virtual_memory().available)
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        # Absent files and the word "max" both mean: no such limit.
        with contextlib.suppress(OSError, ValueError):
            available = min(available, int(Path(limit).read_text()) - int(Path(used).read_text()))
    return max(0, available)
