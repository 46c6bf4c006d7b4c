"""A circuit breaker for one worker: after failures in a row it takes no new work for a while, then one trial.

Used by `fleet.py`; told of results by `journey.py`. Pure: the caller brings the time.
"""

from __future__ import annotations


class Breaker:
    """Closed = usable. Opens after `failures` in a row; each opening without a success between lasts twice as long.

    After a pause one attempt is let through, the trial; others follow once it has brought a token, or after another
    pause without word of it.
    """

    def __init__(self, failures: int, open_s: float, max_s: float) -> None:
        self._limit = failures
        self._open_s = open_s
        self._max_s = max_s
        self._in_a_row = 0
        self._pause_s = open_s
        self._until = 0.0
        self._trial = False

    def closed(self, now: float) -> bool:
        """True when work may be sent."""
        return now >= self._until

    def tried(self, now: float) -> None:
        """An attempt goes there; after a pause it is the trial."""
        if self._in_a_row >= self._limit and now >= self._until:
            self._trial = True
            self._until = now + self._pause_s

    def passed(self) -> None:
        """A token came: the trial went well so far. The next failure opens it again at once."""
        if self._trial:
            self._trial = False
            self._until = 0.0
            self._in_a_row = self._limit - 1

    def succeeded(self) -> None:
        """Forget the past."""
        self._in_a_row = 0
        self._pause_s = self._open_s
        self._until = 0.0
        self._trial = False

    def failed(self, now: float) -> None:
        """Count a failure; many of one incident (while open) count as one."""
        if now < self._until and not self._trial:
            return
        self._trial = False
        self._in_a_row += 1
        if self._in_a_row >= self._limit:
            self._until = now + self._pause_s
            self._pause_s = min(self._pause_s * 2, self._max_s)
