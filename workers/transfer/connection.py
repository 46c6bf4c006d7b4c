"""One non-blocking TCP connection between two workers: whole frames in and out, payload straight into its blocks.

Used by `engine.py`, which owns the selector; sender and receiver see it as a `Channel`. Knows frames, not sessions:
the handler says where a payload lands, and the connection asks before every read whether it still may.

Invariants: nothing is allocated for a frame whose header is not authentic; once `failure` is set nothing more is sent
or handed to the handler.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from penstock.workers.errors import WireError
from penstock.workers.transfer.frame_writer import FrameWriter, first_views, pass_views
from penstock.workers.transfer.frames import (
    HEADER_BYTES,
    NONCE_BYTES,
    PREFACE,
    FrameSeal,
    Header,
    connection_keys,
    preface,
    read_preface,
)
from penstock.workers.transfer.messages import Message, Offer
from penstock.workers.transfer.tls_socket import TlsSocket

# One connection reads at most this much before the others have their turn.
READ_BUDGET_BYTES = 4 << 20
DISCARD_BYTES = 1 << 16
MAX_QUEUED_FRAMES = 1 << 14


class Landing(Protocol):
    """Where the payload of one frame goes."""

    @property
    def open(self) -> bool:
        """False: the session has ended, its blocks may not be written."""
        ...

    def views(self) -> list[memoryview]:
        """Where the offer's blocks go, in order, `block_bytes` for each entry. Asked only while `open`."""
        ...


class Handler(Protocol):
    """Who acts on what arrives: `Sender` on connections this worker opened, `Receiver` on those it accepted.

    All but the last may raise WireError, which ends the connection.
    """

    def on_opened(self, channel: Connection) -> None: ...

    def on_message(self, channel: Connection, message: Message) -> None: ...

    def on_payload(self, channel: Connection, offer: Offer, size: int) -> Landing | None:
        """`size` bytes follow. None: no room for them; they are not read before `channel.resume` has this asked again.

        Raises WireError where the offer's blocks are not of that size.
        """
        ...

    def on_landed(self, channel: Connection, landing: Landing) -> None: ...

    def on_closed(self, channel: Connection, reason: str) -> None: ...


@dataclass(frozen=True, slots=True)
class ConnectionTerms:
    """What all connections of a worker have in common."""

    cluster_key: bytes
    max_payload_bytes: int
    attention: Callable[[Connection], None]  # the connection has failed, or wants (no longer) to write
    drained: Callable[[Connection], None]  # the network has taken some of what was queued
    catch_up: Callable[[], None]  # take the engine's commands so far; called before each frame is acted on


class Connection:
    """Frames over one socket; `connector`: we opened it, and its TCP handshake may still be under way."""

    def __init__(
        self, sock: socket.socket | TlsSocket, handler: Handler, terms: ConnectionTerms, *, connector: bool
    ) -> None:
        self.socket = sock
        self.handler = handler
        self.failure: str | None = None
        self._terms = terms
        self._connector = self._connecting = connector
        self._nonce = os.urandom(NONCE_BYTES)
        self._writer = FrameWriter(sock, preface(self._nonce))
        self._unseal: FrameSeal | None = None  # None until the peer's preface is here
        self._header: Header | None = None  # its body is being read
        self._buffer = memoryview(bytearray(PREFACE.size))  # preface, header or body being read
        self._filled = 0
        self._landing: Landing | None = None  # its payload is being read
        self._landing_views: list[memoryview] = []
        self._payload_left = 0
        self._roomless: Offer | None = None  # its payload is next, and the handler had no room for it
        self._discard = memoryview(bytearray(DISCARD_BYTES))

    @property
    def backlog(self) -> int:
        """Bytes queued and not yet taken by the network."""
        return self._writer.backlog

    @property
    def wants_write(self) -> bool:
        """The selector should tell when the socket takes more."""
        if isinstance(self.socket, TlsSocket) and not self._connecting:
            return self.socket.wants_write(self._writer.busy)
        return self._connecting or self._writer.busy

    @property
    def unread(self) -> bool:
        """There may be something to read of which the selector will not tell."""
        return isinstance(self.socket, TlsSocket) and self.socket.unread

    @property
    def wants_read(self) -> bool:
        """The selector should tell when something has come."""
        return self._roomless is None

    def send(
        self, message: Message, payload: Sequence[memoryview] = (), release: Callable[[], None] | None = None
    ) -> None:
        """Queue a frame and send what the socket takes at once. `release`: its payload is read no more."""
        if self.failure is not None:
            if release is not None:
                release()
        else:
            self._writer.queue(message, payload, release)
            if not self.wants_write:
                self.flush()
            elif self._writer.frames > MAX_QUEUED_FRAMES:
                self.fail("the peer does not read")

    def scrub(self, session_id: bytes) -> None:
        """Read no payload queued for this session any more."""
        self._writer.scrub(session_id)

    def resume(self) -> None:
        """Ask the handler again where the payload goes that waits in the network."""
        if self._roomless is not None and self.failure is None:
            try:
                self._land(self._roomless)
            except WireError as error:
                self.fail(str(error))
            self._terms.attention(self)

    def flush(self) -> None:
        """Send as much as the socket takes; the first call after the TCP handshake learns how that went."""
        try:
            if self._connecting:
                error = self.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                if error:
                    raise OSError(error, os.strerror(error))
                self._connecting = False
            self._writer.flush()
        except BlockingIOError:
            self._terms.attention(self)
        except OSError as error:
            self.fail(f"connection lost: {error.strerror or error}")

    def fail(self, reason: str) -> None:
        """End the connection; the engine closes the socket and tells the handler."""
        if self.failure is None:
            self.failure = reason
            self._writer.clear()
            self._terms.attention(self)

    def on_writable(self) -> None:
        """The selector's turn for writing."""
        self.flush()
        if self.failure is None:
            self._terms.drained(self)
            if not self.wants_write:
                self._terms.attention(self)

    def on_readable(self) -> None:
        """The selector's turn for reading."""
        budget = READ_BUDGET_BYTES
        try:
            while budget > 0 and self.failure is None and self.wants_read:
                received = self._receive()
                if received == 0:
                    self.fail("the peer closed the connection")
                budget -= received
        except BlockingIOError:
            pass
        except OSError as error:
            self.fail(f"connection lost: {error.strerror or error}")
        except WireError as error:
            self.fail(str(error))
        if isinstance(self.socket, TlsSocket):
            self._terms.attention(self)  # reading may have ended a handshake, or left bytes behind

    def _receive(self) -> int:
        """Read once. Returns the number of bytes, 0 at the end."""
        if self._landing is not None:
            return self._receive_payload(self._landing)
        wanted = len(self._buffer) - self._filled
        received = self.socket.recv_into(self._buffer[self._filled :])
        self._filled += received
        if received == wanted:
            self._take(bytes(self._buffer))
        return received

    def _take(self, data: bytes) -> None:
        """A preface, header or body is complete."""
        if self._unseal is None:
            self._agree_on_keys(read_preface(data))
        elif self._header is None:
            header = self._unseal.open_header(data)
            if header.body_frame_bytes:
                self._header = header
                self._next(header.body_frame_bytes)
            else:
                self._dispatch(self._unseal, header, b"")
        else:
            self._dispatch(self._unseal, self._header, data)

    def _next(self, size: int) -> None:
        self._buffer, self._filled = memoryview(bytearray(size)), 0

    def _agree_on_keys(self, peer_nonce: bytes) -> None:
        self._next(HEADER_BYTES)
        nonces = (self._nonce, peer_nonce) if self._connector else (peer_nonce, self._nonce)
        to_listener, to_connector = connection_keys(self._terms.cluster_key, *nonces)
        ours, theirs = (to_listener, to_connector) if self._connector else (to_connector, to_listener)
        self._writer.seal = FrameSeal(ours, self._terms.max_payload_bytes)
        self._unseal = FrameSeal(theirs, self._terms.max_payload_bytes)
        self.handler.on_opened(self)
        self.flush()

    def _dispatch(self, unseal: FrameSeal, header: Header, data: bytes) -> None:
        self._header = None
        self._next(HEADER_BYTES)
        message = unseal.open_body(header, data)
        # A session is expected before its grant leaves this worker, so its frames never overtake the command.
        self._terms.catch_up()
        if isinstance(message, Offer) and message.inline:
            self._payload_left = header.payload_bytes
            self._land(message)
        elif header.payload_bytes:
            raise WireError("transfer: payload on a message that has none")
        else:
            self.handler.on_message(self, message)

    def _land(self, offer: Offer) -> None:
        landing = self._landing = self.handler.on_payload(self, offer, self._payload_left)
        self._roomless = offer if landing is None else None
        if landing is None:
            self._terms.attention(self)
        elif landing.open:
            self._landing_views = landing.views()

    def _receive_payload(self, landing: Landing) -> int:
        """Read into the blocks while the session lives, and away once it has ended."""
        if landing.open:
            received = self.socket.recvmsg_into(first_views(self._landing_views))[0]
            pass_views(self._landing_views, received)
        else:
            received = self.socket.recv_into(self._discard[: min(self._payload_left, DISCARD_BYTES)])
        self._payload_left -= received
        if self._payload_left == 0:
            self._landing, self._landing_views = None, []
            self.handler.on_landed(self, landing)
        return received
