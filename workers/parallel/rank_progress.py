"""How far one rank has come, counted where it works and read by the thread that tells the others.

A rank's step thread is the only writer; the control thread reads (`beat`), and may see a figure a moment old. Time in
which the rank waits for others is kept apart, since in a group every rank is as slow as the slowest: only what a rank
spends by itself shows which one that is.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from penstock.workers.parallel.group_messages import Beat


class RankProgress:
    """`begin` and `end` around every message of the channel of steps; `waiting` around every wait for other ranks."""

    def __init__(self) -> None:
        self.begun = self.done = 0  # sequence numbers
        self.since: float | None = None  # when what was begun was begun
        self._calls = self._steps = 0
        self._waiting = False
        self._busy_s = self._waited_s = 0.0

    def begin(self, sequence: int) -> None:
        """Work on this message begins."""
        self._waited_s = 0.0
        self.since = time.perf_counter()
        self.begun = sequence

    def end(self, *, step: bool) -> float:
        """It is done. Seconds since its begin."""
        took = time.perf_counter() - (self.since or 0.0)
        self.since = None
        if step:
            self._steps += 1
            self._busy_s += max(0.0, took - self._waited_s)
        self.done = self.begun
        return took

    def level(self) -> None:
        """The ranks have met anew: calls count from here, so that a step cut short leaves none of them behind."""
        self._calls = 0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around a call that returns only when other ranks have made theirs."""
        self._calls += 1
        self._waiting = True
        began = time.perf_counter()
        try:
            yield
        finally:
            self._waited_s += time.perf_counter() - began
            self._waiting = False

    def beat(self) -> Beat:
        """What the others are told."""
        busy = self._busy_s
        since = self.since
        if since is not None:  # a step that does not end counts as well
            busy += max(0.0, time.perf_counter() - since - self._waited_s) if not self._waiting else 0.0
        return Beat(self.begun, self.done, self._calls, self._waiting, self._steps, busy)
