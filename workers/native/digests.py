"""Chains of block digests by the processor's SHA instructions; `kv/prefix_cache.py` asks, and defines what they are."""

from __future__ import annotations

import ctypes

from penstock.workers.native.library import load
from penstock.workers.protocol import DIGEST_BYTES


def chain_of(root: bytes, raw: bytes, width: int) -> bytes | None:
    """Digests of all whole pieces of `width` bytes, end to end; None where this machine is not faster than hashlib."""
    library = load()
    blocks = len(raw) // width
    if library is None or not blocks or len(root) != DIGEST_BYTES:
        return None
    digests = bytearray(blocks * DIGEST_BYTES)
    address = ctypes.addressof(ctypes.c_char.from_buffer(digests))
    return bytes(digests) if library.penstock_chain(root, raw, width, blocks, address) == blocks else None
