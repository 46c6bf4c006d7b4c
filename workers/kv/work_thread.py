"""One daemon thread that does jobs in the order they came, and a bound on how many may wait.

Used by `tiers.py` for work that may take long or hang, such as a read of a bad disk: a thread of the interpreter's own
pools would keep a worker from ending until it came back. Knows nothing of what it runs.

Invariants: `submit` never waits; every job that was taken ends in its future, or is cancelled by `stop`.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

log = logging.getLogger(__name__)

T = TypeVar("T")
_Job = tuple[Future[Any], Callable[[], Any]]


class WorkThread:
    """Starts with the first job."""

    def __init__(self, name: str, most_waiting: int) -> None:
        self._name = name
        self._jobs: queue.Queue[_Job | None] = queue.Queue(most_waiting + 1)  # one more: the end
        self._most = most_waiting
        self._thread: threading.Thread | None = None
        self._stopped = False

    def submit(self, job: Callable[[], T]) -> Future[T] | None:
        """Do this when its turn comes; None where too many wait, or after `stop`. From one thread, or from a job."""
        if self._stopped or self._jobs.qsize() >= self._most:
            return None
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            self._thread.start()
        future: Future[T] = Future()
        self._jobs.put((future, job))
        return future

    def stop(self, patience_s: float) -> None:
        """Begin nothing more; wait so long for the job under way. Safe to call twice."""
        self._stopped = True
        while not self._jobs.empty():
            try:
                waiting = self._jobs.get_nowait()
            except queue.Empty:
                break
            if waiting is not None:
                waiting[0].cancel()
        self._jobs.put(None)
        if self._thread is not None:
            self._thread.join(patience_s)

    def _run(self) -> None:
        while (found := self._jobs.get()) is not None:
            future, job = found
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(job())
            except Exception as error:  # the edge of this thread: whoever waits for the job hears of it
                log.exception("a job of %s failed", self._name)
                future.set_exception(error)
