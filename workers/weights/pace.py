"""Keeps all takers of one source together below a rate, which is lower while KV blocks move.

Used by `server.py`: its threads wait here before they answer. Knows neither takers nor KV; time is passed in.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

_BURST_S = 0.05  # what was not used for so long may be caught up with
YIELDING_SHARE = 0.25  # of the rate, while the host has something better to send


class Pace:
    """`busy` says whether something better is being sent."""

    def __init__(
        self,
        bytes_per_s: float,
        busy: Callable[[], bool] = lambda: False,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        burst_s: float = _BURST_S,
    ) -> None:
        self._bytes_per_s = bytes_per_s
        self.busy = busy
        self._clock = clock
        self._sleep = sleep
        self._burst_s = burst_s
        self._lock = threading.Lock()
        self._free_at = 0.0  # when everything asked for so far has been sent

    def take(self, size: int) -> None:
        """Returns when so many bytes may go. Any thread."""
        rate = self._bytes_per_s * (YIELDING_SHARE if self.busy() else 1.0)
        with self._lock:
            now = self._clock()
            begin = max(self._free_at, now - self._burst_s)
            self._free_at = begin + size / rate
        if begin > now:
            self._sleep(begin - now)
