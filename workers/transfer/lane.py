"""A lane: the way of blocks' bytes from one worker to another beside the connection that announces them.

Made by `lane_frames.py` for sender and receiver; used on the transfer thread, which never waits for it: a thread of
the lane's own meets the peer, and then sends or receives one frame after the other, as asked. What has come of it is
posted to the transfer thread. Frames have no names: the peer gets them in the order in which they were sent, so both
ends must ask for the same frames in the same order. It knows neither blocks nor sessions.

Invariants: `failed` is called at most once, and nothing after `close`; a frame's memory is touched until its `done`, or
for as long as the lane's thread still lives after `close`, and nobody else ever writes it.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable

from torch import Tensor

from penstock.workers.errors import PenstockError
from penstock.workers.transfer.pair_group import PairGroup

Post = Callable[[Callable[[], None]], None]  # have the transfer thread call this; any thread
_log = logging.getLogger(__name__)


class Lane:
    """One direction of one pair of workers."""

    def __init__(self, name: str, meet: Callable[[], PairGroup], post: Post, failed: Callable[[str], None]) -> None:
        """`meet` runs on the lane's thread; `failed` on the transfer thread, with the reason."""
        self._meet = meet
        self._post = post
        self._failed = failed
        self._tasks: queue.SimpleQueue[tuple[Callable[[PairGroup], None], Callable[[], None]] | None]
        self._tasks = queue.SimpleQueue()
        self._lock = threading.Lock()  # of `_pair` and `_closed`
        self._pair: PairGroup | None = None
        self._closed = False
        self.in_flight = 0  # frames asked for and not done
        self._thread = threading.Thread(target=self._run, name=f"lane-{name}", daemon=True)
        self._thread.start()

    def send(self, frame: Tensor, done: Callable[[], None]) -> None:
        """Send these bytes, which stay untouched until `done` is called."""
        self._ask(lambda pair: pair.send(frame), done)

    def receive(self, frame: Tensor, done: Callable[[], None]) -> None:
        """Fill this memory; `done` is called once it is."""
        self._ask(lambda pair: pair.receive(frame), done)

    def close(self) -> None:
        """End it now, whatever is under way. Safe to call twice."""
        with self._lock:
            closed, self._closed = self._closed, True
            pair = self._pair
        if not closed:
            self._tasks.put(None)
            if pair is not None:
                pair.abort()

    @property
    def alive(self) -> bool:
        """Its thread has not ended."""
        return self._thread.is_alive()

    def join(self, timeout_s: float) -> None:
        """Wait for its thread, after `close`; one that waits in a backend without abort may take longer."""
        self._thread.join(timeout_s)

    def _ask(self, task: Callable[[PairGroup], None], done: Callable[[], None]) -> None:
        self.in_flight += 1
        self._tasks.put((task, done))

    def _run(self) -> None:
        try:
            pair = self._meet()
            with self._lock:
                self._pair, closed = pair, self._closed
            if closed:
                pair.abort()
                return
            while (asked := self._tasks.get()) is not None:
                task, done = asked
                task(pair)
                self._post(lambda done=done: self._tell(done))  # type: ignore[misc]
        except Exception as error:  # noqa: BLE001 - the thread's edge: whatever it was, the sessions of this lane must end
            reason = str(error)
            if not isinstance(error, PenstockError):
                _log.exception("a lane failed")
                reason = f"{type(error).__name__}: {error}"
            self._post(lambda: self._fail(reason))

    def _tell(self, done: Callable[[], None]) -> None:
        if not self._closed:
            self.in_flight -= 1
            done()

    def _fail(self, reason: str) -> None:
        if not self._closed:
            self.close()
            self._failed(reason)
