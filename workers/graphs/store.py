"""Which buckets have a recording, and the recordings: `GraphStore`, and the one that records while the worker serves.

Used by `decode_graphs.py`. It does not know what a step is. Recordings live in this process only, since they hold raw
addresses and kernel handles; a store that brings them back from disk has the same face. A recording that fails costs
one line of log, and that bucket stays eager; after a few failures nothing is tried any more.
"""

from __future__ import annotations

import logging
from typing import Protocol

from penstock.workers.graphs.capture import Recorder, Recording, Work

logger = logging.getLogger(__name__)

_MOST_FAILURES = 3


class GraphStore(Protocol):
    """Recordings by bucket."""

    @property
    def buckets(self) -> frozenset[int]:
        """Those that can be replayed."""
        ...

    def may_capture(self, bucket: int) -> bool:
        """No recording yet, and none failed."""
        ...

    def capture(self, bucket: int, work: Work) -> bool:
        """Record `work` under the bucket; False where it cannot be recorded."""
        ...

    def replay(self, bucket: int) -> None:
        """Do the recorded work again. Raises KeyError for a bucket that has no recording."""
        ...


class LiveGraphStore:
    """A `GraphStore` that is empty at start and records through `recorder`."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._recordings: dict[int, Recording] = {}
        self._failed: set[int] = set()

    @property
    def buckets(self) -> frozenset[int]:
        """See `GraphStore.buckets`."""
        return frozenset(self._recordings)

    def may_capture(self, bucket: int) -> bool:
        """See `GraphStore.may_capture`."""
        return bucket not in self._recordings and bucket not in self._failed and len(self._failed) < _MOST_FAILURES

    def capture(self, bucket: int, work: Work) -> bool:
        """See `GraphStore.capture`."""
        try:
            self._recordings[bucket] = self._recorder.record(work)
        except RuntimeError as error:  # what torch raises for everything that cannot be recorded
            self._failed.add(bucket)
            if len(self._failed) == 1:
                logger.warning("steps of %d rows cannot be captured and stay eager: %s", bucket, error)
            return False
        return True

    def replay(self, bucket: int) -> None:
        """See `GraphStore.replay`."""
        self._recordings[bucket].replay()
