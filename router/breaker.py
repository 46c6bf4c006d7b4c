"""A circuit breaker for one worker: after failures in a row it takes no new work for a while, then one trial.

Used by `fleet.py`; told of results by `journey.py`. Pure: the caller brings the time.
"""

from __future__ import annotations


class Breaker:
    """Closed = usable. Opens after `failures` in a row; each opening without a success between lasts twice as long."""

    def __init__(self, failures: int, open_s: float, max_s: float) -> None:
        self._limit = failures
        self._open_s = open_s
        self._max_s = max_s
        self._in_a_row = 0
        self._pause_s = open_s
        self._until = 0.0

    def closed(self, now: float) -> bool:
        """True when work may be sent. After a pause that means a trial: the next failure opens it again at once."""
        return now >= self._until

    def succeeded(self) -> None:
        """Forget the past."""
        self._in_a_row = 0
        self._pause_s = self._open_s
        self._until = 0.0

    def failed(self, now: float) -> None:
        """Count a failure; many of one incident (while open) count as one."""
        if now < self._until:
            return
        self._in_a_row += 1
        if self._in_a_row >= self._limit:
            self._until = now + self._pause_s
            self._pause_s = min(self._pause_s * 2, self._max_s)
