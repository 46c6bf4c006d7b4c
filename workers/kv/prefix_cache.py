"""Which blocks of this worker hold the KV of which prefix: a map from SHA-256 chain digests to blocks.

Used by the scheduler (match at admission, publish after a step or a verified transfer) and, for the chain functions,
by the ingress, which computes a prompt's digests once and sends them along. It knows no sequences. Engine thread only.

Invariants:
- a digest names one block, a block carries at most one digest, and exactly those blocks are marked in the pool;
- a block is published only after its KV is complete, and keeps its digest until the pool hands it out for new content;
- of two blocks with equal content the first one published keeps the digest.

The digest of block i is SHA-256(digest of block i-1 || its tokens as int32 little-endian); the chain starts at a root
that stands for all else that shapes KV (tenant salt, model and adapter revision, codec).
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256

import numpy as np
from numpy.typing import NDArray

from penstock.workers.errors import IntegrityError
from penstock.workers.kv.block_pool import BlockPool
from penstock.workers.protocol import DIGEST_BYTES

I32 = NDArray[np.int32]
EVENT_DIGEST_BYTES = 8  # what routers see of a digest


def chain(root: bytes, tokens: Sequence[int] | I32, block_size: int) -> list[bytes]:
    """Digests (32 bytes each) of all full blocks of `tokens`, the first one following `root`."""
    raw = np.asarray(tokens, dtype="<i4").tobytes()
    width = 4 * block_size
    digest, digests = root, []
    for start in range(0, len(raw) // width * width, width):
        digest = sha256(digest + raw[start : start + width]).digest()
        digests.append(digest)
    return digests


def chain_digests(root: bytes, tokens: Sequence[int] | I32, block_size: int) -> bytes:
    """The same as one string, as `GenerateRequest.prefix_digests` carries it."""
    return b"".join(chain(root, tokens, block_size))


def split_digests(digests: bytes) -> list[bytes]:
    """The digests of a chain, one by one."""
    return [digests[i : i + DIGEST_BYTES] for i in range(0, len(digests), DIGEST_BYTES)]


class PrefixCache:
    """The map over one `BlockPool`; sees the pool's evictions."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._blocks: dict[bytes, int] = {}
        self._digests: list[bytes | None] = [None] * pool.num_blocks
        # Changes since the last take_events; a digest stored and evicted in between is in neither, so each is bounded.
        self._stored: dict[bytes, None] = {}
        self._evicted: dict[bytes, None] = {}
        pool.watch_evictions(self._evict)

    def __len__(self) -> int:
        return len(self._blocks)

    def match(self, digests: Sequence[bytes]) -> list[int]:
        """Blocks of the longest known prefix of a chain. They stay free until shared: share before allocating."""
        hits = []
        known = self._blocks
        for digest in digests:
            block = known.get(digest)
            if block is None:
                break
            hits.append(block)
        return hits

    def publish(self, digests: Sequence[bytes], blocks: Sequence[int]) -> None:
        """Name owned blocks whose KV is complete. Digests already known are skipped: the first block stays."""
        known, carried = self._blocks, self._digests
        for digest, block in zip(digests, blocks, strict=True):
            if digest in known:
                continue
            if carried[block] is not None:
                raise IntegrityError(f"block {block} already carries another digest")
            known[digest] = block
            carried[block] = digest
            self._pool.mark_cached(block)
            if digest in self._evicted:
                del self._evicted[digest]
            else:
                self._stored[digest] = None

    def take_events(self) -> tuple[bytes, bytes]:
        """(stored, evicted) since the last call, each the first 8 bytes of every digest. A digest is in one at most."""
        stored, evicted = _shorten(self._stored), _shorten(self._evicted)
        self._stored.clear()
        self._evicted.clear()
        return stored, evicted

    def snapshot(self) -> bytes:
        """First 8 bytes of every known digest. Take (and send) the events first: the snapshot contains them."""
        return _shorten(self._blocks)

    def check_integrity(self) -> None:
        """Raise IntegrityError unless map, carried digests and the pool's marks agree."""
        carried = {digest: block for block, digest in enumerate(self._digests) if digest is not None}
        if carried != self._blocks:
            raise IntegrityError("the digest map and the digests of the blocks differ")
        if not np.array_equal(self._pool.cached_blocks(), sorted(carried.values())):
            raise IntegrityError("the pool's cached marks are not the cache's blocks")
        if not self._stored.keys() <= carried.keys() or self._evicted.keys() & carried.keys():
            raise IntegrityError("pending events contradict the map")

    def _evict(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            digest = self._digests[block]
            if digest is None:
                raise IntegrityError(f"evicted block {block} carries no digest")
            del self._blocks[digest]
            self._digests[block] = None
            if digest in self._stored:
                del self._stored[digest]
            else:
                self._evicted[digest] = None


def _shorten(digests: dict[bytes, None] | dict[bytes, int]) -> bytes:
    return b"".join([digest[:EVENT_DIGEST_BYTES] for digest in digests])
