"""What happened at one tier so far, counted by the threads that make it happen; read by the heartbeat."""

from __future__ import annotations

from penstock.workers.totals import TierFigures


class TierCounts:
    """The fields are those of `TierFigures`. Each is counted by one thread, but for `dropped`, where a lost count of
    two threads at once is no matter."""

    def __init__(self) -> None:
        self.hits = self.misses = self.loaded = self.stored = self.evictions = self.dropped = self.errors = 0

    def figures(self, held: int) -> TierFigures:
        """With the number of blocks held now."""
        counts = (self.hits, self.misses, self.loaded, self.stored, self.evictions, self.dropped, self.errors)
        return TierFigures(held, *counts)
