"""The sending half of a connection: frames queue up, are sealed as they leave, and payload is read from its blocks.

Used by `connection.py`. Frames are sealed late so that `scrub` can take a session's frames out of the queue without
leaving a gap in the sequence numbers.

Invariants: after `scrub(s)` no payload view queued for session s is read; a frame's `release` is called once, when its
payload views are read no more.
"""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from penstock.workers.transfer.frames import FrameSeal
from penstock.workers.transfer.messages import Message, session_of
from penstock.workers.transfer.tls_socket import TlsSocket

MAX_VIEWS = 1000  # per system call; Linux takes 1024
CALL_BYTES = 1 << 20  # views that hold more than this are not handed to one call: a socket would not take it


@dataclass(frozen=True, slots=True)
class _Queued:
    message: Message
    payload: Sequence[memoryview]
    release: Callable[[], None] | None

    def done(self) -> None:
        if self.release is not None:
            self.release()


class FrameWriter:
    """Queue and partly sent frame of one connection. `opening` goes out first, unsealed."""

    def __init__(self, sock: socket.socket | TlsSocket, opening: bytes) -> None:
        self.seal: FrameSeal | None = None  # frames wait until it is set
        self._socket = sock
        self._queue: deque[_Queued] = deque()
        self._queued_bytes = 0
        self._views = [memoryview(opening)]  # what is being sent: one head, then payload
        self._views_bytes = len(opening)
        self._in_head = True  # `_views[0]` is (the rest of) the head
        self._sending: _Queued | None = None  # whose payload is in `_views`

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

    def queue(self, message: Message, payload: Sequence[memoryview], release: Callable[[], None] | None = None) -> None:
        """Append a frame."""
        self._queue.append(_Queued(message, payload, release))
        self._queued_bytes += _size(payload)

    def flush(self) -> None:
        """Send what the socket takes. Raises BlockingIOError when it takes no more, OSError when it is broken."""
        while self._views or self._load():
            self._advance(self._socket.sendmsg(first_views(self._views)))

    def clear(self) -> None:
        """Forget everything; the connection has ended."""
        dropped, self._queue = self._queue, deque()
        self._views = []
        self._queued_bytes = self._views_bytes = 0
        self._payload_done()
        for frame in dropped:
            frame.done()

    def scrub(self, session_id: bytes) -> None:
        """Drop the session's queued frames; one half sent goes on with zeros, which its reader will not keep.

        It will not, because Finish is sent last: it is either dropped here, or all payload has left before.
        """
        dropped = [frame for frame in self._queue if session_of(frame.message)[0] == session_id]
        if dropped:
            self._queue = deque(frame for frame in self._queue if session_of(frame.message)[0] != session_id)
            self._queued_bytes = sum(_size(frame.payload) for frame in self._queue)
        if self._sending is not None and session_of(self._sending.message)[0] == session_id:
            head = bytes(self._views[0]) if self._in_head else b""
            self._views = [memoryview(head + bytes(self._views_bytes - len(head)))]
            self._payload_done()
        for frame in dropped:
            frame.done()

    def _load(self) -> bool:
        """Seal the next frames, up to and with the first that has a payload. False: nothing to send."""
        if self.seal is None or not self._queue:
            return False
        heads: list[bytes] = []
        payload: Sequence[memoryview] = ()
        while self._queue and not payload and len(heads) < MAX_VIEWS:
            frame = self._queue.popleft()
            payload = frame.payload
            heads.append(self.seal.seal(frame.message, _size(payload)))
            if payload:
                self._sending = frame
        head, size = b"".join(heads), _size(payload)
        self._queued_bytes -= size
        self._views = [memoryview(head), *payload]
        self._views_bytes = len(head) + size
        self._in_head = True
        return True

    def _advance(self, sent: int) -> None:
        self._views_bytes -= sent
        whole = pass_views(self._views, sent)
        self._in_head = self._in_head and not whole
        if not self._views:
            self._payload_done()

    def _payload_done(self) -> None:
        frame, self._sending = self._sending, None
        if frame is not None:
            frame.done()


def first_views(views: list[memoryview]) -> list[memoryview]:
    """As many of the views, from the first, as one system call should be given."""
    total = 0
    for place, view in enumerate(views):
        total += len(view)
        if total >= CALL_BYTES or place == MAX_VIEWS - 1:
            return views[: place + 1]
    return views


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
