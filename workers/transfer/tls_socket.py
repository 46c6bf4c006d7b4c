"""A non-blocking socket that speaks TLS: what `connection.py` and `frame_writer.py` ask of a plain one, encrypted.

`socket_loop.py` makes one around each connection where the cluster's processes encrypt. TLS works in memory here and
the socket stays ours, so that a call that would block raises BlockingIOError as a plain socket's does, a connection may
still be on its way when this is made, and bytes once taken by `sendmsg` need never be given again.

TLS breaks two assumptions of a selector, hence `wants_write` and `unread`: in a handshake a writer waits for the peer's
bytes, and bytes that have left the socket may not have been read yet.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
from collections.abc import Sequence

_CALL_BYTES = 1 << 18  # encrypted in one call
_READ_BYTES = 1 << 18


class TlsSocket:
    """Owns `sock`. `unread`: more may be read before the selector tells of anything."""

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, *, connector: bool) -> None:
        self.unread = False
        self._socket = sock
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=not connector)
        self._agreed = False  # the handshake is done
        self._unsent = memoryview(b"")  # encrypted, on its way
        self._scratch = memoryview(bytearray(_READ_BYTES))

    def wants_write(self, busy: bool) -> bool:
        """The selector should tell when the socket takes more; `busy`: there are bytes for `sendmsg`."""
        return bool(self._unsent) or self._outgoing.pending > 0 or (busy and self._agreed)

    def fileno(self) -> int:
        """The socket's descriptor."""
        return self._socket.fileno()

    def getsockopt(self, level: int, option: int) -> int:
        """Of the socket."""
        return self._socket.getsockopt(level, option)

    def close(self) -> None:
        """Close the socket. No farewell: every frame says what is to come."""
        self._socket.close()

    def sendmsg(self, views: Sequence[memoryview]) -> int:
        """Encrypt some of the views and send what the socket takes; the rest leaves with later calls."""
        self._push()
        if not self._agreed:
            self._agree()
        taken = 0
        for view in views:
            if taken == _CALL_BYTES:
                break
            if view:
                taken += self._tls.write(view[: _CALL_BYTES - taken])
        with contextlib.suppress(BlockingIOError):
            self._push()
        return taken

    def recv_into(self, view: memoryview) -> int:
        """Read what is here, however many records it came in; 0 at the end."""
        count = 0
        while count < len(view):
            try:
                if not self._agreed:
                    self._agree()
                read = self._tls.read(len(view) - count, view[count:])
            except (BlockingIOError, ssl.SSLWantReadError):
                self.unread = False
                if count:
                    return count
                received = self._socket.recv_into(self._scratch)
                if not received:
                    return 0
                self._incoming.write(self._scratch[:received])
            except ssl.SSLZeroReturnError:
                return count
            else:
                count += int(read)
        self.unread = self._tls.pending() > 0 or self._incoming.pending > 0
        return count

    def recvmsg_into(self, views: Sequence[memoryview]) -> tuple[int]:
        """Read once, into the first view."""
        return (self.recv_into(views[0]),)

    def _agree(self) -> None:
        """Go on with the handshake. Raises BlockingIOError while the peer is to say something."""
        try:
            self._tls.do_handshake()
            self._agreed = True
        except ssl.SSLWantReadError:
            raise BlockingIOError from None
        finally:  # also what tells the peer why not
            with contextlib.suppress(OSError):
                self._push()

    def _push(self) -> None:
        while self._unsent or self._outgoing.pending:
            if not self._unsent:
                self._unsent = memoryview(self._outgoing.read())
            self._unsent = self._unsent[self._socket.send(self._unsent) :]
