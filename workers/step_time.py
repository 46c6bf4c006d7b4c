"""How long a step will take: seconds as a straight line over its tokens, fitted online from measured steps.

The engine feeds and asks it; routers see its answer in the heartbeat and judge progress by it. Least squares with
exponential forgetting, so that it follows a machine whose speed changes. The first steps are left out: they load code
and touch memory for the first time, and a gate that took them for the worker's pace would turn everybody away. A
slope that the scatter of the steps could have made by chance is none: routers follow the line far beyond the steps it
was fitted to, and one disturbed step must not make a worker look slow to all who would give it work. Knows no clock
and no plan.
"""

from __future__ import annotations

from dataclasses import dataclass

_KEEP = 0.98  # weight of the past per observed step: it remembers about 50 steps
_CERTAIN = 4.0  # standard errors that a slope must differ from none
_PRIOR_S = 5.0  # before enough was measured


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a step loop stands; `since` is when the step began, None while nothing is computed."""

    step: int = 0
    since: float | None = None
    predicted_s: float = 0.0
    base_s: float = 0.0  # of the line fitted to all steps so far; 0 and 0 while there is none
    token_s: float = 0.0


class StepTimeModel:
    """`predict(tokens)` in seconds; `observe` improves it."""

    def __init__(self, first_steps: int = 3, least_steps: int = 8) -> None:
        """`first_steps` are left out; so many more are measured before there is a line."""
        self._first, self._least = first_steps, least_steps
        self._count = 0
        self._weight = self._x = self._y = self._xx = self._xy = self._yy = 0.0

    def observe(self, tokens: int, seconds: float) -> None:
        """A step that computed `tokens` took `seconds`."""
        self._count += 1
        if self._count <= self._first:
            return
        self._weight = self._weight * _KEEP + 1.0
        self._x = self._x * _KEEP + tokens
        self._y = self._y * _KEEP + seconds
        self._xx = self._xx * _KEEP + tokens * tokens
        self._xy = self._xy * _KEEP + tokens * seconds
        self._yy = self._yy * _KEEP + seconds * seconds

    def predict(self, tokens: int) -> float:
        """Expected seconds of a step of `tokens`, never negative."""
        if self._count < self._first + self._least:
            return _PRIOR_S
        base_s, token_s = self.line()
        return max(base_s + token_s * tokens, 0.0)

    def line(self) -> tuple[float, float]:
        """Seconds of a step without tokens (below zero where the fit says so), and per token; zeros while unknown."""
        if self._count < self._first + self._least:
            return 0.0, 0.0
        mean_x, mean_y = self._x / self._weight, self._y / self._weight
        spread_x = self._xx / self._weight - mean_x * mean_x
        spread_y = self._yy / self._weight - mean_y * mean_y
        slope = (self._xy / self._weight - mean_x * mean_y) / spread_x if spread_x > 1e-9 else 0.0
        explained = slope * slope * spread_x
        scatter = max(0.0, spread_y - explained) / max(1.0, self._weight - 2.0)
        if slope <= 0.0 or explained <= _CERTAIN * _CERTAIN * scatter:
            return mean_y, 0.0
        return mean_y - slope * mean_x, slope
