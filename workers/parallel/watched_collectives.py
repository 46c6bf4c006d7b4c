"""Collectives that leave word of where a rank stands: entered how many, inside one or not, how long it has waited.

Wrapped around a group's collectives by the assembly, so that the watch over the group can tell the rank that others
wait for from those that wait. It changes nothing of what they compute.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from penstock.workers.parallel.collectives import Collectives
from penstock.workers.parallel.rank_progress import RankProgress


class WatchedCollectives:
    """See `Collectives`."""

    def __init__(self, own: Collectives, progress: RankProgress) -> None:
        self._own = own
        self._progress = progress

    @property
    def rank(self) -> int:
        """See `Collectives.rank`."""
        return self._own.rank

    @property
    def width(self) -> int:
        """See `Collectives.width`."""
        return self._own.width

    def all_reduce(self, x: Tensor) -> Tensor:
        """See `Collectives.all_reduce`."""
        with self._progress.waiting():
            return self._own.all_reduce(x)

    def gather_columns(self, x: Tensor) -> Tensor | None:
        """See `Collectives.gather_columns`."""
        with self._progress.waiting():
            return self._own.gather_columns(x)

    def all_gather(self, x: Tensor) -> Tensor:
        """See `Collectives.all_gather`."""
        with self._progress.waiting():
            return self._own.all_gather(x)

    def all_to_all(self, rows: Tensor, send_counts: Sequence[int], receive_counts: Sequence[int]) -> Tensor:
        """See `Collectives.all_to_all`."""
        with self._progress.waiting():
            return self._own.all_to_all(rows, send_counts, receive_counts)

    def broadcast(self, x: Tensor, source: int = 0) -> Tensor:
        """See `Collectives.broadcast`."""
        with self._progress.waiting():
            return self._own.broadcast(x, source)

    def barrier(self) -> None:
        """See `Collectives.barrier`."""
        with self._progress.waiting():
            self._own.barrier()

    def close(self) -> None:
        """See `Collectives.close`."""
        self._own.close()
