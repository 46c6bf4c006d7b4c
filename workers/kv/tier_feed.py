"""What routers hear of a prefix cache with tiers below it: a block counts as held as long as any tier holds it.

Stands in the place of the cache before `kv_feed.py`. A router sends a context where its blocks are held and weighs a
block below the pool like one in it: bringing it back is given up as soon as computing would be quicker, so the place
with the block is never much worse than any other, and there is nothing else to tell apart.

`TierChanges` is written by the tiers' threads; everything else happens on the engine's thread.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable

from penstock.workers.kv_feed import CacheEvents
from penstock.workers.protocol import DIGEST_BYTES

_HEAD_BYTES = 8  # what routers see of a digest
_MANY = 1 << 10


class TierChanges:
    """Digests that came to a tier or left it since somebody asked."""

    def __init__(self) -> None:
        self._digests: set[bytes] = set()
        self._guard = threading.Lock()

    def __len__(self) -> int:
        return len(self._digests)

    def note(self, digests: bytes) -> None:
        """Something happened to these; from any thread."""
        with self._guard:
            self._digests.update(_parts(digests, DIGEST_BYTES))

    def take(self) -> set[bytes]:
        """All of them; none is left."""
        with self._guard:
            taken, self._digests = self._digests, set()
        return taken


class TieredCache:
    """`CacheEvents` of a cache and the tiers below it, which say what they hold."""

    def __init__(self, cache: CacheEvents, holds: Callable[[bytes], bool], changes: TierChanges) -> None:
        self._cache = cache
        self._holds = holds
        self._changes = changes
        self._in_pool: set[bytes] = set()  # heads
        self._in_tiers: set[bytes] = set()
        self._told: set[bytes] = set()  # what routers believe

    @property
    def many_events(self) -> bool:
        """See `PrefixCache.many_events`."""
        return self._cache.many_events or len(self._changes) > _MANY

    def take_events(self) -> tuple[bytes, bytes]:
        """See `PrefixCache.take_events`."""
        stored, evicted = (set(_parts(heads, _HEAD_BYTES)) for heads in self._cache.take_events())
        self._in_pool |= stored
        self._in_pool -= evicted
        touched = stored | evicted
        for digest in self._changes.take():
            head = digest[:_HEAD_BYTES]
            touched.add(head)
            (self._in_tiers.add if self._holds(digest) else self._in_tiers.discard)(head)
        held = {head for head in touched if head in self._in_pool or head in self._in_tiers}
        new, gone = held - self._told, (touched - held) & self._told
        self._told |= new
        self._told -= gone
        return b"".join(sorted(new)), b"".join(sorted(gone))

    def snapshot(self) -> bytes:
        """See `PrefixCache.snapshot`."""
        return b"".join(sorted(self._told))


def _parts(whole: bytes, size: int) -> Iterable[bytes]:
    return (whole[at : at + size] for at in range(0, len(whole), size))
