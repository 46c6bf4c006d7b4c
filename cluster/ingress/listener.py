"""The HTTP server of one ingress process: uvicorn on a socket that we bind ourselves.

Started by `ingress_replica.py` inside its Serve replica. Binding here and not in Ray Serve lets a successor take the
port at once (Serve's direct ingress binds without SO_REUSEADDR, so a killed replica blocks its port for a minute), lets
several replicas of one machine share it, and needs no proxy process. `tests/benchmarks/serve_paths.py` compares.

Connections are accepted here too, so that a replica that gives way to its successor on the same port loses none: what
the kernel has handed over already is taken before the socket closes, and new connections get time to say what they
want. What is still in its handshake at that moment is lost unless the kernel's `net.ipv4.tcp_migrate_req` is 1.
"""

from __future__ import annotations

import asyncio
import logging
import math
import socket
import ssl
from typing import Any

import uvicorn

from penstock.cluster.ingress.http_protocol import guarded_protocol
from penstock.cluster.settings import LimitSettings

log = logging.getLogger(__name__)

BACKLOG = 2048
ACCEPT_AT_ONCE = 64  # before other work of the loop gets its turn
ACCEPT_AGAIN_S = 0.2
SAY_WITHIN_S = 0.5  # for the first request on a connection taken just before the end
LAST_WORD_S = 1.0  # beyond the drain time, for those who are told then that it is over
SEND_BUFFER_BYTES = 128 << 10  # of one connection; the kernel doubles it
KEEP_ALIVE_S = 75  # longer than the idle time of the usual load balancers, so that they close first


class Listener:
    """Serves one ASGI application on the running loop."""

    def __init__(
        self,
        app: Any,
        host: str,
        port: int,
        *,
        shared: bool,
        drain_s: float,
        limits: LimitSettings | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """Binds, but listens only from `start` on: a connection is never left to somebody who is not ready for it.

        OSError when the port is taken. `shared`: other replicas of this machine listen there too. `tls`: HTTPS, and
        nothing else.
        """
        self._tls = tls
        # Who never finishes the handshake is bounded like who never finishes a head; None where there is none.
        self._handshake_s = (limits or LimitSettings()).body_timeout_s if tls is not None else None
        self._socket = _bind(host, port, shared)
        config = uvicorn.Config(
            app,
            http=guarded_protocol(limits or LimitSettings()),
            interface="asgi3",  # else it is guessed from what kind of callable this is
            lifespan="off",
            ws="none",
            access_log=False,
            log_config=None,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=math.ceil(drain_s + LAST_WORD_S),
        )
        self._server = uvicorn.Server(config)
        self._task: asyncio.Task[None] | None = None
        self._joining: set[asyncio.Task[Any]] = set()  # accepted connections on their way to the server

    @property
    def port(self) -> int:
        """The port that was taken."""
        return int(self._socket.getsockname()[1])

    @property
    def serving(self) -> bool:
        """False before `start` and once the server has ended, for whatever reason."""
        return self._task is not None and not self._task.done()

    def start(self) -> None:
        """Listen and serve on the running loop. OSError when somebody else began to listen there."""
        self._socket.listen(BACKLOG)
        self._socket.setblocking(False)
        loop = asyncio.get_running_loop()
        self._task = loop.create_task(self._server.serve(sockets=[]))  # no sockets of its own: accepting is ours
        loop.add_reader(self._socket.fileno(), self._accept, ACCEPT_AT_ONCE)

    async def stop(self) -> None:
        """Accept no more, let answers end within the drain time, cut the others."""
        if self._task is not None:
            asyncio.get_running_loop().remove_reader(self._socket.fileno())
            taken = self._accept(BACKLOG)
            self._socket.close()
            await asyncio.gather(*self._joining, return_exceptions=True)
            if taken:
                await asyncio.sleep(SAY_WITHIN_S)
            self._server.should_exit = True
            await asyncio.gather(self._task, return_exceptions=True)
        self._socket.close()

    def _accept(self, most: int) -> int:
        """Take connections that wait; how many they were."""
        for taken in range(most):
            try:
                connection, _ = self._socket.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return taken
            except OSError as error:  # out of file descriptors, most likely: those who wait go on waiting
                log.warning("cannot accept connections: %s", error)
                asyncio.get_running_loop().call_later(ACCEPT_AGAIN_S, self._accept_again)
                asyncio.get_running_loop().remove_reader(self._socket.fileno())
                return taken
            connection.setblocking(False)
            task = asyncio.ensure_future(self._join(connection))
            self._joining.add(task)
            task.add_done_callback(self._joined)
        return most

    async def _join(self, connection: socket.socket) -> None:
        await asyncio.get_running_loop().connect_accepted_socket(
            self._protocol, connection, ssl=self._tls, ssl_handshake_timeout=self._handshake_s
        )

    def _accept_again(self) -> None:
        if self._socket.fileno() >= 0 and not self._server.should_exit:
            asyncio.get_running_loop().add_reader(self._socket.fileno(), self._accept, ACCEPT_AT_ONCE)

    def _joined(self, task: asyncio.Task[Any]) -> None:
        self._joining.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.warning("a connection was lost while it was accepted: %s", task.exception())

    def _protocol(self) -> asyncio.Protocol:
        """One connection, as uvicorn's own accepting would make it."""
        config = self._server.config
        kind: Any = config.http_protocol_class
        protocol: asyncio.Protocol = kind(config=config, server_state=self._server.server_state, app_state={})
        return protocol


def _bind(host: str, port: int, shared: bool) -> socket.socket:
    listening = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Inherited by connections. asyncio sets it only on sockets it made itself; without, small chunks wait 40 ms.
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # Inherited too: a caller who does not read holds so much of ours in the kernel, and no more.
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        if shared:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listening.bind((host, port))
    except OSError:
        listening.close()
        raise
    return listening
