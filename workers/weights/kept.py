"""The copy of one weight file that a taker keeps of what it was given: an unnamed, sparse file, and what of it is here.

`arriving.py` writes it and maps it, `stored.py` serves from it while the load still goes on, so that takers that start
together hand the weights on instead of all asking one source (Hoplite's dynamic tree: Zhuang et al. 2021, section 3.3).
The file has no name: it is gone with the process, and no later one trusts it.

Invariant: a run counts as here only after all its bytes were written, and those were verified before.
"""

from __future__ import annotations

import os
import threading
from bisect import bisect_left, bisect_right

from penstock.workers import fault_points
from penstock.workers.errors import ModelError
from penstock.workers.fault_points import Point
from penstock.workers.weights.runs import Run


class Kept:
    """Written by one thread, asked by any."""

    def __init__(self, directory: str, size: int) -> None:
        """Raises OSError where the directory's file system has no unnamed files."""
        self.descriptor = os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        os.ftruncate(self.descriptor, size)
        self._lock = threading.Lock()
        # Runs of columns would be millions of stretches: they are remembered as they were asked for, because another
        # rank of the same place asks for the very same ones.
        self._begins: list[int] = []  # of stretches without gaps, apart from each other, in order
        self._ends: list[int] = []
        self._columns: set[Run] = set()

    def write(self, run: Run, data: memoryview) -> None:
        """Put a verified run where it belongs. Raises ModelError when the disk is full."""
        try:
            for row in range(run.count):
                self._write_all(run.begin + row * run.stride, data[row * run.length : (row + 1) * run.length])
        except OSError as error:
            raise ModelError(
                f"the copy of the weights cannot be written (weights.copy_dir): {error.strerror}"
            ) from error
        with self._lock:
            if run.count > 1:
                self._columns.add(run)
            else:
                self._add(run.begin, run.end)

    def has(self, run: Run) -> bool:
        """Whether all of the run is here."""
        with self._lock:
            if run in self._columns:
                return True
            place = bisect_right(self._begins, run.begin) - 1
            return place >= 0 and run.end <= self._ends[place]

    def _write_all(self, position: int, data: memoryview) -> None:
        if fault_points.plan is not None:
            fault_points.plan.reach(Point.DISK_WRITE, "")
        while data:
            count = os.pwrite(self.descriptor, data, position)
            position, data = position + count, data[count:]

    def _add(self, begin: int, end: int) -> None:
        first = bisect_left(self._ends, begin)
        last = bisect_right(self._begins, end)
        if first < last:
            begin, end = min(begin, self._begins[first]), max(end, self._ends[last - 1])
        self._begins[first:last] = [begin]
        self._ends[first:last] = [end]
