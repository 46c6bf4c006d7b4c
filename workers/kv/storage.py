"""The bytes of a worker's KV blocks: one memory file that other processes of the same host can open read-only.

Created by the worker process; the runner and the transfer thread write through `data`, the block pool bumps
`generations`. A prefill worker's storage is attached by decode workers that copy blocks out of it. The module knows
bytes only, neither layouts nor who owns a block.

The file is anonymous (memfd): it lives as long as some process holds it, so a killed worker leaves nothing behind.
Invariant: its size is sealed, so an attached reader can never be hit by a truncation (SIGBUS).

    header (64 bytes) | generations uint64 [num_blocks] | padding to 64 | data uint8 [num_blocks, block_bytes]
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import struct
from pathlib import Path

import numpy as np
import psutil
from numpy.typing import NDArray

from penstock.workers.errors import ConfigError, WireError

_MAGIC = b"PSTKKV01"
_HEADER = struct.Struct("<8sQQQ")  # magic, num_blocks, block_bytes, offset of data
_ALIGN = 64
_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE, which the mmap module of Python 3.11 does not name
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


class KVStorage:
    """One worker's KV bytes. `data` uint8 [num_blocks, block_bytes]; `generations` uint64 [num_blocks].

    `path` names the file for other processes of this host while this one lives. Build it with `create` or `attach`.
    """

    def __init__(self, descriptor: int, num_blocks: int, block_bytes: int, *, writable: bool) -> None:
        offset, size = _extents(num_blocks, block_bytes)
        access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ
        self._descriptor = descriptor
        self._map = mmap.mmap(descriptor, size, access=access)
        if writable:
            # Touch every page now: a shortage shows at start, and no transfer pays for page faults later. Kernels
            # before 5.14 do not know the advice and fault on first use as ever.
            try:
                self._map.madvise(_POPULATE_WRITE)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
        self.num_blocks = num_blocks
        self.block_bytes = block_bytes
        self.path = f"/proc/{os.getpid()}/fd/{descriptor}"
        self.generations: NDArray[np.uint64] = np.frombuffer(self._map, np.uint64, num_blocks, _ALIGN)
        flat = np.frombuffer(self._map, np.uint8, num_blocks * block_bytes, offset)
        self.data: NDArray[np.uint8] = flat.reshape(num_blocks, block_bytes)

    @staticmethod
    def create(num_blocks: int, block_bytes: int) -> KVStorage:
        """A zeroed storage that this process owns. Raises ConfigError where the host's memory cannot hold it."""
        if num_blocks < 1 or block_bytes < 1:
            raise ConfigError(f"a KV pool of {num_blocks} blocks of {block_bytes} bytes is empty", key="kv.num_blocks")
        offset, size = _extents(num_blocks, block_bytes)
        available = available_bytes()
        if size > available:
            raise ConfigError(
                f"the KV pool needs {size >> 20} MiB and {available >> 20} MiB are available; lower "
                "--kv-cache-memory-bytes or --num-gpu-blocks-override",
                key="kv.memory_bytes",
            )
        descriptor = os.memfd_create("penstock-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(descriptor, size)
            os.pwrite(descriptor, _HEADER.pack(_MAGIC, num_blocks, block_bytes, offset), 0)
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
            return KVStorage(descriptor, num_blocks, block_bytes, writable=True)
        except OSError as error:
            os.close(descriptor)
            raise ConfigError(f"the KV pool of {size >> 20} MiB cannot be mapped: {error}", key="kv") from error

    @staticmethod
    def attach(path: str) -> KVStorage:
        """Another process's storage, read-only. OSError: it cannot be opened; WireError: it is no KV storage."""
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            num_blocks, block_bytes = _read_header(descriptor, path)
            return KVStorage(descriptor, num_blocks, block_bytes, writable=False)
        except (OSError, WireError):
            os.close(descriptor)
            raise

    def close(self) -> None:
        """Give the descriptor back. The memory goes once the last view of it is gone. Safe to call twice."""
        if self._descriptor < 0:
            return
        self.data = np.zeros((0, self.block_bytes), np.uint8)
        self.generations = np.zeros(0, np.uint64)
        # A runner may still hold a view: then the map closes with it, not here.
        with contextlib.suppress(BufferError):
            self._map.close()
        os.close(self._descriptor)
        self._descriptor = -1


def _extents(num_blocks: int, block_bytes: int) -> tuple[int, int]:
    """(offset of the data, size of the file) in bytes."""
    offset = -(-(_ALIGN + 8 * num_blocks) // _ALIGN) * _ALIGN
    return offset, offset + num_blocks * block_bytes


def _read_header(descriptor: int, path: str) -> tuple[int, int]:
    """(num_blocks, block_bytes) of a foreign file, after checking that mapping and reading it is safe."""
    size = os.fstat(descriptor).st_size
    raw = os.pread(descriptor, _HEADER.size, 0)
    if len(raw) != _HEADER.size:
        raise WireError(f"{path} is no KV storage: too short")
    magic, num_blocks, block_bytes, offset = _HEADER.unpack(raw)
    if magic != _MAGIC or num_blocks < 1 or block_bytes < 1 or (offset, size) != _extents(num_blocks, block_bytes):
        raise WireError(f"{path} is no KV storage: its header does not match its size")
    try:
        seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
    except OSError as error:
        raise WireError(f"{path} is no KV storage: not a memory file") from error
    if seals & _SEALS != _SEALS:
        raise WireError(f"{path} is no KV storage: its size is not sealed")
    return num_blocks, block_bytes


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
