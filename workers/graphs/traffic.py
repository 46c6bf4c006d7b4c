"""Which captures pay: how often each bucket is used, and what a replay saves against an eager step.

Used by `decode_graphs.py`, kept across restarts by `record.py`. Pure: times come in, measured by the runner.

The gain of a bucket not captured yet is guessed from the nearest one that is: launching kernels costs about the same
for any number of rows. An idle moment is used for the bucket with the largest traffic x gain; without idle moments, a
bucket is captured once its lost time has reached what a capture costs, which is at most twice the best that could be
done with foresight (Karlin et al. 1988, renting against buying).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

_KEEP = 0.9  # weight of the past in averages
_GUESSED_GAIN = 0.25  # share of an eager step that a replay saves, before any was measured
_FIRST_CAPTURE_S = 0.5  # before any was measured


@dataclass(slots=True)
class BucketFigures:
    """One bucket: steps so far, and average seconds of an eager and of a replayed step; None before the first."""

    steps: float = 0.0
    eager_s: float | None = None
    replay_s: float | None = None


class BucketTraffic:
    """`saw` after every step; `hottest` and `is_due` say what to capture."""

    def __init__(self, figures: dict[int, BucketFigures] | None = None) -> None:
        """`figures`: of the worker's former life."""
        self._figures: dict[int, BucketFigures] = dict(figures or {})
        self._lost_s: dict[int, float] = {}
        self._capture_s = _FIRST_CAPTURE_S

    @property
    def figures(self) -> dict[int, BucketFigures]:
        """By bucket; do not change."""
        return self._figures

    def saw(self, bucket: int, seconds: float, *, replayed: bool) -> None:
        """A step of this bucket took so long."""
        figures = self._figures.setdefault(bucket, BucketFigures())
        figures.steps += 1
        if replayed:
            figures.replay_s = _average(figures.replay_s, seconds)
        else:
            figures.eager_s = _average(figures.eager_s, seconds)
            self._lost_s[bucket] = self._lost_s.get(bucket, 0.0) + self.gain_s(bucket)

    def captured(self, bucket: int, seconds: float) -> None:
        """A capture took so long."""
        self._capture_s = _average(self._capture_s, seconds)
        self._lost_s.pop(bucket, None)

    def gain_s(self, bucket: int) -> float:
        """Seconds that a replay saves per step: measured, or guessed; never negative."""
        figures = self._figures.get(bucket)
        if figures is None or figures.eager_s is None:
            return 0.0
        if figures.replay_s is not None:
            return max(0.0, figures.eager_s - figures.replay_s)
        measured = [
            (abs(other - bucket), max(0.0, known.eager_s - known.replay_s))
            for other, known in self._figures.items()
            if known.eager_s is not None and known.replay_s is not None
        ]
        if measured:
            return min(min(measured)[1], figures.eager_s)
        return _GUESSED_GAIN * figures.eager_s

    def hottest(self, candidates: Iterable[int]) -> int | None:
        """Of these buckets the one with the largest traffic x gain; None where none would gain."""
        worth = [(self._worth(bucket), bucket) for bucket in candidates]
        best = max(worth, default=(0.0, 0))
        return best[1] if best[0] > 0 else None

    def is_due(self, bucket: int) -> bool:
        """The time lost by not having captured this bucket has reached what a capture costs."""
        return self._lost_s.get(bucket, 0.0) >= self._capture_s

    def _worth(self, bucket: int) -> float:
        figures = self._figures.get(bucket)
        return figures.steps * self.gain_s(bucket) if figures is not None else 0.0


def _average(before: float | None, seconds: float) -> float:
    return seconds if before is None else _KEEP * before + (1 - _KEEP) * seconds
