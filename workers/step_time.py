"""How long a step will take: seconds as a straight line over its tokens, fitted online from measured steps.

The engine feeds and asks it; routers see its answer in the heartbeat and judge progress by it. Least squares with
exponential forgetting, so that it follows a machine whose speed changes. Knows no clock and no plan.
"""

from __future__ import annotations

from dataclasses import dataclass

_KEEP = 0.98  # weight of the past per observed step: it remembers about 50 steps
_PRIOR_S = 5.0  # before anything was measured: first steps load code and touch memory for the first time
_LEAST_STEPS = 3


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a step loop stands; `since` is when the step began, None while nothing is computed."""

    step: int = 0
    since: float | None = None
    predicted_s: float = 0.0


class StepTimeModel:
    """`predict(tokens)` in seconds; `observe` improves it."""

    def __init__(self) -> None:
        self._count = 0
        self._weight = self._x = self._y = self._xx = self._xy = 0.0

    def observe(self, tokens: int, seconds: float) -> None:
        """A step that computed `tokens` took `seconds`."""
        self._count += 1
        self._weight = self._weight * _KEEP + 1.0
        self._x = self._x * _KEEP + tokens
        self._y = self._y * _KEEP + seconds
        self._xx = self._xx * _KEEP + tokens * tokens
        self._xy = self._xy * _KEEP + tokens * seconds

    def predict(self, tokens: int) -> float:
        """Expected seconds of a step of `tokens`, never negative."""
        if self._count < _LEAST_STEPS:
            return _PRIOR_S
        mean_x, mean_y = self._x / self._weight, self._y / self._weight
        spread = self._xx / self._weight - mean_x * mean_x
        slope = (self._xy / self._weight - mean_x * mean_y) / spread if spread > 1e-9 else 0.0
        slope = max(slope, 0.0)
        return max(mean_y + slope * (tokens - mean_x), 0.0)
