"""What a prefix cache stored and evicted since somebody asked last, as routers hear of it.

Owned by `prefix_cache.py`, which notes whole runs of digests. Only when somebody asks, or when much has gathered, is
it looked at what happened to a digest twice, and only where a small hash says that it may have.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from penstock.workers.protocol import DIGEST_BYTES

_Heads = NDArray[np.uint64]  # what routers see of digests: the first 8 bytes of each

_MANY = 1 << 10  # changes worth telling at once
_MOST = 1 << 16  # changes kept before they are summed up
_BUCKETS = 1 << 16

Digests = NDArray[np.uint8]  # [n, 32]


def shorten(digests: bytes) -> bytes:
    """The first 8 bytes of every digest."""
    return _heads(_rows(digests)).tobytes()


class CacheChanges:
    """Net changes, by digest. Nothing at first."""

    def __init__(self) -> None:
        self._parts: list[tuple[bool, bytes]] = []  # (stored, or evicted; digests), in order
        self._gathered = 0  # digests in them
        self._marks = np.zeros(_BUCKETS, np.uint8)  # all zero between calls

    @property
    def many(self) -> bool:
        """So much has gathered that it should be taken soon."""
        return self._gathered > _MANY

    def note(self, digests: bytes, *, stored: bool) -> None:
        """These digests were stored, or evicted."""
        self._parts.append((stored, digests))
        self._gathered += len(digests) // DIGEST_BYTES
        if self._gathered > _MOST:
            net = self._net()
            self._parts = list(zip((True, False), [part.tobytes() for part in net], strict=True))
            self._gathered = sum(map(len, net))

    def take(self) -> tuple[bytes, bytes]:
        """(stored, evicted) since the last call, shortened. A digest is in one at most, and only if it changed."""
        stored, evicted = self._net()
        self._parts.clear()
        self._gathered = 0
        return _heads(stored).tobytes(), _heads(evicted).tobytes()

    def _net(self) -> tuple[Digests, Digests]:
        """Stored and evicted, without what was stored and evicted again or the other way round."""
        stored = _rows(b"".join([part for kind, part in self._parts if kind]))
        evicted = _rows(b"".join([part for kind, part in self._parts if not kind]))
        if not len(stored) or not len(evicted):
            return stored, evicted
        both = self._both(stored, evicted)
        return self._net_of_both(both) if both else (stored, evicted)

    def _net_of_both(self, both: frozenset[bytes]) -> tuple[Digests, Digests]:
        """The same where some digests were stored as well as evicted: the order of their changes decides."""
        kinds, parts = zip(*self._parts, strict=True)
        digests = _rows(b"".join(parts))
        stored = np.repeat(kinds, [len(part) // DIGEST_BYTES for part in parts])
        marked = _buckets(_rows(b"".join(both)))
        self._marks[marked] = 1
        doubtful = self._marks[_buckets(digests)] == 1
        self._marks[marked] = 0
        net: dict[bytes, bool] = {}
        for index in doubtful.nonzero()[0].tolist():
            digest, kind = digests[index].tobytes(), bool(stored[index])
            if net.pop(digest, kind) == kind:
                net[digest] = kind
        apart = [_rows(b"".join([digest for digest, kind in net.items() if kind is way])) for way in (True, False)]
        return (
            np.concatenate((digests[stored & ~doubtful], apart[0])),
            np.concatenate((digests[~stored & ~doubtful], apart[1])),
        )

    def _both(self, stored: Digests, evicted: Digests) -> frozenset[bytes]:
        """Digests that were both stored and evicted; only those are compared whose bucket saw both."""
        marks, of_stored, of_evicted = self._marks, _buckets(stored), _buckets(evicted)
        marks[of_stored] = 1
        doubtful = marks[of_evicted].nonzero()[0]
        marks[of_stored] = 0
        if not len(doubtful):
            return frozenset()
        marks[of_evicted[doubtful]] = 1
        others = marks[of_stored].nonzero()[0]
        marks[of_evicted] = 0
        return frozenset(map(bytes, stored[others])) & frozenset(map(bytes, evicted[doubtful]))


def _rows(digests: bytes) -> Digests:
    return np.frombuffer(digests, np.uint8).reshape(-1, DIGEST_BYTES)


def _heads(digests: Digests) -> _Heads:
    """What routers see of these digests; numpy copies whole numbers much faster than rows of bytes."""
    heads: _Heads = digests.view(np.uint64)[:, 0]
    return heads


def _buckets(digests: Digests) -> NDArray[np.intp]:
    return digests.view(np.uint16)[:, 0].astype(np.intp)
