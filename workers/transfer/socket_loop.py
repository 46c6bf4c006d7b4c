"""The selector of the transfer thread: wake-up, listener and connections, and the address peers are given.

Used by `engine.py` only. Knows when a socket can be read or written and when one is finished; what is said on it is
`connection.py`'s and its handler's. All methods but `wake` belong to the transfer thread.

Invariant: a connection is registered from `_add` until its handler's `on_closed`, which is called once.
"""

from __future__ import annotations

import errno
import ipaddress
import logging
import os
import selectors
import socket
import time
from collections.abc import Callable

from penstock.workers.errors import ConfigError
from penstock.workers.transfer.connection import Connection, ConnectionTerms, Handler

MAX_CONNECTIONS = 1024
ACCEPT_PAUSE_S = 0.01
Ready = list[tuple[selectors.SelectorKey, int]]
_log = logging.getLogger(__name__)


class SocketLoop:
    """`acceptor` handles connections that peers open. Raises ConfigError when nothing can listen on `host`."""

    def __init__(self, host: str, acceptor: Handler, terms: Callable[[SocketLoop], ConnectionTerms]) -> None:
        self._terms = terms(self)
        self._acceptor = acceptor
        self._attention: dict[Connection, None] = {}
        self._listener = _listen(host)
        self.address = _format(self._listener.getsockname())
        self._eventfd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._eventfd, selectors.EVENT_READ, None)
        self._selector.register(self._listener, selectors.EVENT_READ, None)

    def wake(self) -> None:
        """Make `wait` return. Any thread, until `close`."""
        os.eventfd_write(self._eventfd, 1)

    def wait(self, timeout_s: float | None) -> Ready:
        """Sleep until there is something to do; takes the wake-ups so far."""
        ready = self._selector.select(timeout_s)
        if any(key.fd == self._eventfd for key, _ in ready):
            os.eventfd_read(self._eventfd)
        return ready

    def serve(self, ready: Ready) -> bool:
        """Read and write what can be. True: a new connection owes its hello."""
        accepted = False
        for key, mask in ready:
            if key.fileobj is self._listener:
                accepted = self._accept() or accepted
            elif isinstance(key.data, Connection):
                _serve(key.data, mask)
        self.settle()
        return accepted

    def settle(self) -> None:
        """Close what has failed and note who wants to write."""
        while self._attention:
            connection = next(iter(self._attention))
            del self._attention[connection]
            if connection.failure is None:
                write = selectors.EVENT_WRITE if connection.wants_write else 0
                self._selector.modify(connection.socket, selectors.EVENT_READ | write, connection)
            elif connection.socket.fileno() >= 0:
                self._selector.unregister(connection.socket)
                connection.socket.close()
                connection.handler.on_closed(connection, connection.failure)

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
        for key in list(self._selector.get_map().values()):
            if isinstance(key.data, Connection):
                key.data.fail(reason)
        self.settle()
        self._selector.close()
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
        if len(self._selector.get_map()) > MAX_CONNECTIONS:
            sock.close()
            return False
        self._add(sock, self._acceptor, connector=False)
        return True

    def _add(self, sock: socket.socket, handler: Handler, *, connector: bool) -> Connection:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        connection = Connection(sock, handler, self._terms, connector=connector)
        self._selector.register(sock, selectors.EVENT_READ | selectors.EVENT_WRITE, connection)
        return connection


def _serve(connection: Connection, mask: int) -> None:
    try:
        if mask & selectors.EVENT_WRITE and connection.failure is None:
            connection.on_writable()
        if mask & selectors.EVENT_READ and connection.failure is None:
            connection.on_readable()
    except Exception:  # noqa: BLE001 - one peer's edge: a defect met on its connection must not end the other sessions
        _log.exception("a transfer connection failed")
        connection.fail("internal error")


def _listen(host: str) -> socket.socket:
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


def _format(where: tuple[str, int]) -> str:
    host = f"[{where[0]}]" if ":" in where[0] else where[0]
    return f"{host}:{where[1]}"
