"""KV blocks in a bounded region of host memory, by prefix digest: what the block pool had to let go, least used last.

Used by `tiers.py`. Knows bytes and digests only. Holds whole blocks in fixed places, so that it never fragments and
allocates nothing while it serves.

Invariants: one thread calls everything but `in`, which any thread may ask; a block that `read` gives is the one that
was stored under its digest, byte for byte, or it is not given.
"""

from __future__ import annotations

import mmap
from collections import OrderedDict
from typing import NamedTuple

from xxhash import xxh3_64_intdigest

from penstock.workers.errors import ConfigError
from penstock.workers.kv.storage import available_bytes


class _Held(NamedTuple):
    place: int
    checksum: int


def checksum_of(block: memoryview | bytes, digest: bytes) -> int:
    """Of a block's bytes, which are then no other digest's."""
    return xxh3_64_intdigest(block, seed=int.from_bytes(digest[:8], "little"))


class HostTier:
    """As many blocks of `block_bytes` as fit in `host_bytes`."""

    def __init__(self, host_bytes: int, block_bytes: int) -> None:
        """Raises ConfigError where not even one block fits, or the host has not so much memory."""
        self.capacity = host_bytes // block_bytes
        if not self.capacity:
            raise ConfigError(
                f"kv.host_bytes {host_bytes} holds no block of {block_bytes} bytes; give more, or 0 for no host tier",
                key="kv.host_bytes",
            )
        size, available = self.capacity * block_bytes, available_bytes()
        if size > available:
            raise ConfigError(
                f"the KV host tier needs {size >> 20} MiB and {available >> 20} MiB are available; lower kv.host_bytes",
                key="kv.host_bytes",
            )
        self._region = memoryview(mmap.mmap(-1, size))  # pages come with their first use
        self._block_bytes = block_bytes
        self._held: OrderedDict[bytes, _Held] = OrderedDict()  # least recently used first
        self._free = list(range(self.capacity - 1, -1, -1))

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._held

    def __len__(self) -> int:
        return len(self._held)

    def store(self, digest: bytes, block: memoryview | bytes) -> bytes | None:
        """Keep a copy of this block. Returns the digest that gave way, if one had to."""
        gone: bytes | None = None
        if digest in self._held:
            self.drop(digest)
        elif not self._free:
            gone, held = self._held.popitem(last=False)
            self._free.append(held.place)
        place = self._free.pop()
        view = self._view(place)
        view[:] = block
        self._held[digest] = _Held(place, checksum_of(view, digest))
        return gone

    def read(self, digest: bytes) -> memoryview | None:
        """The block where it lies, until the next call of `store` or `drop`. None: unknown, or damaged and dropped."""
        held = self._held.get(digest)
        if held is None:
            return None
        view = self._view(held.place)
        if checksum_of(view, digest) != held.checksum:
            self.drop(digest)
            return None
        self._held.move_to_end(digest)
        return view

    def drop(self, digest: bytes) -> None:
        """Forget this block; unknown ones are ignored."""
        held = self._held.pop(digest, None)
        if held is not None:
            self._free.append(held.place)

    def _view(self, place: int) -> memoryview:
        return self._region[place * self._block_bytes : (place + 1) * self._block_bytes]
