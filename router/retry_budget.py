"""A bound on attempts after failures and refusals: one in ten of the first attempts, so that retries feed no collapse.

Used by `attempts.py`, the one layer that retries. A bucket holds what first attempts earned; who finds it empty waits
for what the clock adds, so a request that was let in is slowed down but never dropped. Attempts after a worker's death
or in a drain are not paced: they are no sign of overload, and their streams are waiting. Pure: the caller brings the
time.
"""

from __future__ import annotations

_LONGEST_S = 5.0  # nobody waits longer, however many wait


class RetryBudget:
    """Retries that may start now. `share` is earned per first attempt, `per_s` with time, up to `burst`."""

    def __init__(self, share: float, per_s: float, burst: float) -> None:
        self._share = share
        self._per_s = per_s
        self._burst = self._level = burst
        self._at: float | None = None

    def earn(self) -> None:
        """A request goes out for the first time."""
        self._level = min(self._burst, self._level + self._share)

    def spend(self, now: float) -> float:
        """One goes out again: seconds it should wait before."""
        elapsed = 0.0 if self._at is None else max(0.0, now - self._at)
        self._at = now
        self._level = min(self._burst, self._level + elapsed * self._per_s) - 1.0
        self._level = max(self._level, -_LONGEST_S * self._per_s)
        return max(0.0, -self._level) / self._per_s
