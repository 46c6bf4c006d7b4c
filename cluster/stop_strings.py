"""Finds stop strings in text that arrives in pieces, and never lets a part of one out too early.

One `StopMatcher` per choice, used by the ingress. Where stops overlap, the one that completes first wins, the longer
one of those that complete together; so the result does not depend on how the text was cut into pieces.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Text in, safe text out. After `stopped` nothing more comes out; `rest` is what stood behind the stop."""

    __slots__ = ("_held", "_include", "_stops", "rest", "stopped")

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        self._stops = tuple(stops)
        self._include = include
        self._held = ""
        self.rest = ""
        self.stopped: str | None = None

    def push(self, text: str) -> str:
        """What may be shown now: everything before a stop, less what could still become one."""
        if self.stopped is not None or not text:
            return ""
        buffer = self._held + text
        found = self._first(buffer)
        if found is not None:
            start, stop = found
            self._held, self.stopped, self.rest = "", stop, buffer[start + len(stop) :]
            return buffer[: start + len(stop)] if self._include else buffer[:start]
        keep = self._unfinished(buffer)
        self._held = buffer[len(buffer) - keep :]
        return buffer[: len(buffer) - keep]

    def finish(self) -> str:
        """The text held back, when no more will come."""
        held, self._held = self._held, ""
        return held

    def _first(self, buffer: str) -> tuple[int, str] | None:
        best: tuple[int, int, str] | None = None
        for stop in self._stops:
            start = buffer.find(stop)
            if start >= 0 and (best is None or (start + len(stop), start) < best[:2]):
                best = (start + len(stop), start, stop)
        return None if best is None else best[1:]

    def _unfinished(self, buffer: str) -> int:
        """Length of the longest end of `buffer` with which a stop begins."""
        longest = 0
        for stop in self._stops:
            start = buffer.find(stop[0], max(0, len(buffer) - len(stop) + 1))
            while 0 <= start < len(buffer) - longest:
                if stop.startswith(buffer[start:]):
                    longest = len(buffer) - start
                    break
                start = buffer.find(stop[0], start + 1)
        return longest
