"""The sending half of a connection: frames queue up, are sealed as they leave, and payload is read from its blocks.

Used by `connection.py`. Frames are sealed late so that `scrub` can take a session's frames out of the queue without
leaving a gap in the sequence numbers.

Invariant: after `scrub(s)` no payload view queued for session s is read.
"""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Sequence

from penstock.workers.transfer.frames import FrameSeal
from penstock.workers.transfer.messages import Message, session_of

MAX_VIEWS = 1000  # per system call; Linux takes 1024


class FrameWriter:
    """Queue and partly sent frame of one connection. `opening` goes out first, unsealed."""

    def __init__(self, sock: socket.socket, opening: bytes) -> None:
        self.seal: FrameSeal | None = None  # frames wait until it is set
        self._socket = sock
        self._queue: deque[tuple[Message, Sequence[memoryview]]] = deque()
        self._queued_bytes = 0
        self._views = [memoryview(opening)]  # what is being sent: one head, then payload
        self._views_bytes = len(opening)
        self._in_head = True  # `_views[0]` is (the rest of) the head
        self._session: bytes | None = None  # whose payload is in `_views`

    @property
    def busy(self) -> bool:
        """A frame is partly sent, or ready to be."""
        return bool(self._views)

    @property
    def frames(self) -> int:
        """Frames queued behind the one being sent."""
        return len(self._queue)

    @property
    def backlog(self) -> int:
        """Payload bytes queued, and all bytes of the frame being sent."""
        return self._queued_bytes + self._views_bytes

    def queue(self, message: Message, payload: Sequence[memoryview]) -> None:
        """Append a frame."""
        self._queue.append((message, payload))
        self._queued_bytes += _size(payload)

    def flush(self) -> None:
        """Send what the socket takes. Raises BlockingIOError when it takes no more, OSError when it is broken."""
        while self._views or self._load():
            self._advance(self._socket.sendmsg(self._views[:MAX_VIEWS]))

    def clear(self) -> None:
        """Forget everything; the connection has ended."""
        self._queue.clear()
        self._views = []
        self._queued_bytes = self._views_bytes = 0

    def scrub(self, session_id: bytes) -> None:
        """Drop the session's queued frames; one half sent goes on with zeros, which its reader will not keep.

        It will not, because Finish is sent last: it is either dropped here, or all payload has left before.
        """
        if self._queue:
            self._queue = deque(frame for frame in self._queue if session_of(frame[0])[0] != session_id)
            self._queued_bytes = sum(_size(payload) for _, payload in self._queue)
        if self._session == session_id:
            head = bytes(self._views[0]) if self._in_head else b""
            self._views = [memoryview(head + bytes(self._views_bytes - len(head)))]
            self._session = None

    def _load(self) -> bool:
        """Seal the next frames, up to and with the first that has a payload. False: nothing to send."""
        if self.seal is None or not self._queue:
            return False
        heads: list[bytes] = []
        payload: Sequence[memoryview] = ()
        while self._queue and not payload and len(heads) < MAX_VIEWS:
            message, payload = self._queue.popleft()
            heads.append(self.seal.seal(message, _size(payload)))
            self._session = session_of(message)[0] if payload else None
        self._queued_bytes -= _size(payload)
        head = b"".join(heads)
        self._views = [memoryview(head), *payload]
        self._views_bytes = len(head) + _size(payload)
        self._in_head = True
        return True

    def _advance(self, sent: int) -> None:
        self._views_bytes -= sent
        whole = pass_views(self._views, sent)
        self._in_head = self._in_head and not whole
        if not self._views:
            self._session = None


def pass_views(views: list[memoryview], count: int) -> int:
    """Remove the first `count` bytes from the list of views, in place; returns how many views went whole."""
    whole = 0
    while whole < len(views) and count >= len(views[whole]):
        count -= len(views[whole])
        whole += 1
    del views[:whole]
    if count:
        views[0] = views[0][count:]
    return whole


def _size(payload: Sequence[memoryview]) -> int:
    return sum(map(len, payload))
