"""A link between a transfer `Sender` and `Receiver` that a test delivers by hand: late, twice, out of order, or never.

Frames that have left (`flush`) hold a copy of their payload; before that, their views are read as late as possible,
which is what a socket with a full buffer does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from penstock.workers.errors import WireError
from penstock.workers.transfer.messages import CODES, Message, Offer, decode_body, encode_body, session_of
from penstock.workers.transfer.receiver import Receiver
from penstock.workers.transfer.sender import Sender


@dataclass(slots=True, eq=False)
class Frame:
    """One frame on its way; `views` are live until it is flushed."""

    message: Message
    views: list[memoryview] | None
    payload: bytes = b""
    release: Callable[[], None] | None = None

    def flush(self) -> None:
        if self.views is not None:
            self.payload = b"".join(bytes(view) for view in self.views)
            self.drop()

    def drop(self) -> None:
        """Read no view any more."""
        self.views = None
        if self.release is not None:
            self.release()


class HostileChannel:
    """One end's `Channel`; `outbox` is what it has sent and the test has not yet delivered."""

    def __init__(self) -> None:
        self.outbox: list[Frame] = []
        self.failure: str | None = None

    @property
    def backlog(self) -> int:
        return sum(sum(map(len, frame.views)) for frame in self.outbox if frame.views is not None)

    def send(
        self, message: Message, payload: Sequence[memoryview] = (), release: Callable[[], None] | None = None
    ) -> None:
        if self.failure is None:
            code, (session_id, epoch) = CODES[type(message)], session_of(message)
            message = decode_body(code, session_id, epoch, encode_body(message))  # through the wire's own eyes
            self.outbox.append(Frame(message, list(payload) or None, release=release))  # without payload it has left

    def scrub(self, session_id: bytes) -> None:
        scrubbed = [f for f in self.outbox if f.views is not None and session_of(f.message)[0] == session_id]
        self.outbox = [f for f in self.outbox if f not in scrubbed]
        for frame in scrubbed:
            frame.drop()

    def resume(self) -> None:
        raise AssertionError("this link's receivers always have room")

    def fail(self, reason: str) -> None:
        self.failure = self.failure or reason


class HostileLink:
    """`sender_end` and `receiver_end` are the two channels; the handshake is done in order, the rest is the test's."""

    def __init__(self) -> None:
        self.sender_end, self.receiver_end = HostileChannel(), HostileChannel()
        self.sender: Sender | None = None
        self.receiver: Receiver | None = None
        self._landing = None

    def connect(self, _address: str) -> HostileChannel:
        """What the sender gets as `connect`."""
        return self.sender_end

    def handshake(self) -> None:
        """Prefaces, Hello, Welcome."""
        self.receiver.on_opened(self.receiver_end)
        self.sender.on_opened(self.sender_end)
        self.deliver_to_receiver(0)
        self.deliver_to_sender(0)

    @property
    def landing_pending(self) -> bool:
        """A payload is on its way into blocks; nothing else comes out of the connection meanwhile."""
        return self._landing is not None

    def deliver_to_receiver(self, index: int, *, keep: bool = False, hold: bool = False) -> None:
        """Hand over the index-th frame. `keep`: it will come again. `hold`: its payload lands at `land` only."""
        frame = self.sender_end.outbox[index]
        frame.flush()
        if not keep:
            del self.sender_end.outbox[index]
        try:
            if isinstance(frame.message, Offer) and frame.message.inline:
                self._landing = (
                    self.receiver.on_payload(self.receiver_end, frame.message, len(frame.payload)),
                    frame.payload,
                )
                if not hold:
                    self.land()
            else:
                self.receiver.on_message(self.receiver_end, frame.message)
        except WireError as error:
            self.receiver_end.fail(str(error))

    def land(self, flip: int | None = None) -> None:
        """Write the held payload as `Connection` does: only while the session lives. `flip` damages one byte."""
        landing, payload = self._landing
        self._landing = None
        if flip is not None:
            payload = payload[:flip] + bytes([payload[flip] ^ 1]) + payload[flip + 1 :]
        if landing.open:
            at = 0
            for view in landing.views():
                view[:] = payload[at : at + len(view)]
                at += len(view)
        self.receiver.on_landed(self.receiver_end, landing)

    def deliver_to_sender(self, index: int, *, keep: bool = False) -> None:
        """Hand over the index-th answer."""
        frame = self.receiver_end.outbox[index]
        if not keep:
            del self.receiver_end.outbox[index]
        self.sender.on_message(self.sender_end, frame.message)

    def deliver_all(self) -> None:
        """Be a good link until nothing is left."""
        if self.landing_pending:
            self.land()
        while self.sender_end.outbox or self.receiver_end.outbox:
            while self.sender_end.outbox:
                self.deliver_to_receiver(0)
            while self.receiver_end.outbox:
                self.deliver_to_sender(0)
            self.sender.on_drained(self.sender_end)
