"""The selector of the transfer thread: wake-up, listener and connections, and the address peers are given.

Used by `engine.py` only. Knows when a socket can be read or written and when one is finished; what is said on it is
`connection.py`'s and its handler's. All methods but `wake` belong to the transfer thread.

Invariant: a connection is in `_connections` from `_add` until its handler's `on_closed`, which is called once. The
system watches it for what it wants; one that has no room for what comes is not read.
"""

from __future__ import annotations

import errno
import ipaddress
import logging
import os
import select
import socket
import time
from collections.abc import Callable

from penstock.workers.errors import ConfigError
from penstock.workers.tls import PeerTls
from penstock.workers.transfer.connection import Connection, ConnectionTerms, Handler
from penstock.workers.transfer.tls_socket import TlsSocket

MAX_CONNECTIONS = 1024
# Between two workers of one host the bytes stay in the cores' caches when few are on their way: a quarter more per
# second than with the megabytes that the system allows (`tests/benchmarks/transfer.py`), which a real network needs.
SAME_HOST_BUFFER_BYTES = 1 << 20
ACCEPT_PAUSE_S = 0.01
Ready = list[tuple[int, int]]  # (descriptor, event mask)
_log = logging.getLogger(__name__)


class SocketLoop:
    """`acceptor` handles connections that peers open; `buffer_bytes` as in `TransferSettings.socket_buffer_bytes`.

    Raises ConfigError when nothing can listen on `host`.
    """

    def __init__(
        self,
        host: str,
        buffer_bytes: int,
        acceptor: Handler,
        terms: Callable[[SocketLoop], ConnectionTerms],
        tls: PeerTls | None = None,
    ) -> None:
        self._tls = tls
        self._terms = terms(self)
        self._acceptor = acceptor
        self._buffer_bytes = buffer_bytes
        self._connections: dict[int, Connection] = {}  # by descriptor
        self._events: dict[int, int] = {}  # of the connections that the system watches
        self._attention: dict[Connection, None] = {}
        self._unread: dict[Connection, None] = {}  # who can read although the system tells of nothing
        self._listener = listen_on(host)
        self.address = numeric_address(self._listener.getsockname())
        self._eventfd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll = select.epoll()
        self._epoll.register(self._eventfd, select.EPOLLIN)
        self._epoll.register(self._listener, select.EPOLLIN)

    def wake(self) -> None:
        """Make `wait` return. Any thread, until `close`."""
        os.eventfd_write(self._eventfd, 1)

    def wait(self, timeout_s: float | None) -> Ready:
        """Sleep until there is something to do; takes the wake-ups so far."""
        ready = self._epoll.poll(timeout_s)
        for descriptor, _ in ready:
            if descriptor == self._eventfd:
                os.eventfd_read(self._eventfd)
        return ready

    def serve(self, ready: Ready) -> bool:
        """Read and write what can be. True: a new connection owes its hello."""
        accepted = False
        unread, self._unread = self._unread, {}
        for ahead in unread:
            if ahead.failure is None and ahead.wants_read:
                _serve(ahead, select.EPOLLIN)
        for descriptor, mask in ready:
            connection = self._connections.get(descriptor)
            if connection is not None:
                _serve(connection, mask)
            elif descriptor != self._eventfd:
                accepted = self._accept() or accepted
        self.settle()
        return accepted

    def settle(self) -> None:
        """Close what has failed and note who wants to write."""
        while self._attention:
            connection = next(iter(self._attention))
            del self._attention[connection]
            if connection.failure is None:
                self._listen_to(connection)
            elif self._connections.pop(connection.socket.fileno(), None) is not None:
                self._events.pop(connection.socket.fileno(), None)
                connection.socket.close()  # which ends the watch as well
                connection.handler.on_closed(connection, connection.failure)

    def _listen_to(self, connection: Connection) -> None:
        """Have the selector tell what this connection wants to know."""
        descriptor = connection.socket.fileno()
        events = select.EPOLLIN if connection.wants_read else 0
        if connection.wants_write:
            events |= select.EPOLLOUT
        if self._events.get(descriptor) != events:
            self._epoll.modify(descriptor, events)
            self._events[descriptor] = events
        if connection.wants_read and connection.unread:
            self._unread[connection] = None
            self.wake()

    def attend(self, connection: Connection) -> None:
        """`ConnectionTerms.attention`: `settle` will look at this connection."""
        self._attention[connection] = None

    def connect(self, address: str, handler: Handler) -> Connection:
        """Begin a connection to host:port; the host is numeric, as a name would block. Raises OSError, ValueError."""
        host, _, port = address.rpartition(":")
        ip, number = ipaddress.ip_address(host.strip("[]")), int(port)
        if not 0 < number < 1 << 16:
            raise ValueError(f"no port: {address}")
        sock = socket.socket(socket.AF_INET6 if ip.version == 6 else socket.AF_INET, socket.SOCK_STREAM)
        sock.setblocking(False)
        code = sock.connect_ex((str(ip), number))
        if code not in (0, errno.EINPROGRESS):
            sock.close()
            raise OSError(code, os.strerror(code))
        return self._add(sock, handler, connector=True)

    def close(self, reason: str) -> None:
        """End every connection and release all descriptors."""
        for connection in list(self._connections.values()):
            connection.fail(reason)
        self.settle()
        self._epoll.close()
        self._listener.close()
        os.close(self._eventfd)

    def _accept(self) -> bool:
        try:
            sock, _ = self._listener.accept()
        except OSError as error:
            # Out of descriptors, or the peer has gone again. The listener stays readable, so do not spin on it.
            if error.errno in (errno.EMFILE, errno.ENFILE):
                _log.error("no descriptor left for a transfer connection: raise the open files limit")
                time.sleep(ACCEPT_PAUSE_S)
            return False
        if len(self._connections) >= MAX_CONNECTIONS:
            sock.close()
            return False
        self._add(sock, self._acceptor, connector=False)
        return True

    def _add(self, sock: socket.socket, handler: Handler, *, connector: bool) -> Connection:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._size_buffers(sock)
        if self._tls is None:
            connection = Connection(sock, handler, self._terms, connector=connector)
        else:
            context = self._tls.opening if connector else self._tls.accepting
            secured = TlsSocket(sock, context, connector=connector)
            connection = Connection(secured, handler, self._terms, connector=connector)
        self._connections[sock.fileno()] = connection
        self._events[sock.fileno()] = select.EPOLLIN | select.EPOLLOUT
        self._epoll.register(sock, select.EPOLLIN | select.EPOLLOUT)
        return connection

    def _size_buffers(self, sock: socket.socket) -> None:
        """Set both buffers as the settings say; by default only towards a peer on this host."""
        size = self._buffer_bytes
        if not size:
            try:
                if sock.getsockname()[0] != sock.getpeername()[0]:
                    return
            except OSError:  # still connecting, so the peer is elsewhere: connections within a host are there at once
                return
            size = SAME_HOST_BUFFER_BYTES
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, size)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size)


def _serve(connection: Connection, mask: int) -> None:
    try:
        if mask & (select.EPOLLERR | select.EPOLLHUP) and not connection.wants_read:
            connection.fail("connection lost")  # nobody reads from it, so nothing else would notice
        # An error or the peer's end makes both calls fail, and either tells what it was.
        if mask & ~select.EPOLLIN and connection.failure is None:
            connection.on_writable()
        if mask & ~select.EPOLLOUT and connection.failure is None:
            connection.on_readable()
    except Exception:  # noqa: BLE001 - one peer's edge: a defect met on its connection must not end the other sessions
        _log.exception("a transfer connection failed")
        connection.fail("internal error")


def listen_on(host: str) -> socket.socket:
    """A listener on any free port of one interface; peers get its numeric address."""
    try:
        family, _, _, _, where = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        if ipaddress.ip_address(where[0]).is_unspecified:
            raise ConfigError("name one interface: peers cannot reach 'any'", key="transfer.host")
        listener = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise ConfigError(f"cannot listen on {host}: {error}", key="transfer.host") from error
    try:
        listener.bind(where)
        listener.listen(256)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise ConfigError(f"cannot listen on {host}: {error}", key="transfer.host") from error
    return listener


def numeric_address(where: tuple[str, int]) -> str:
    """host:port of a socket's own end, as peers are told it."""
    host = f"[{where[0]}]" if ":" in where[0] else where[0]
    return f"{host}:{where[1]}"
