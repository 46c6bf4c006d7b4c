"""The HTTP server of one ingress process: uvicorn on a socket that we bind ourselves.

Started by `serve_app.py` inside its Serve replica. Binding here and not in Ray Serve lets a successor take the port
at once (Serve's direct ingress binds without SO_REUSEADDR, so a killed replica blocks its port for a minute), lets
several replicas of one machine share it, and needs no proxy process. `tests/benchmarks/serve_paths.py` compares.
"""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import uvicorn

BACKLOG = 2048
KEEP_ALIVE_S = 75  # longer than the idle time of the usual load balancers, so that they close first


class Listener:
    """Serves one ASGI application on the running loop."""

    def __init__(self, app: Any, host: str, port: int, *, shared: bool, drain_s: float) -> None:
        """Binds at once; OSError when the port is taken. `shared`: other replicas of this machine listen there too."""
        self._socket = _bind(host, port, shared)
        config = uvicorn.Config(
            app,
            lifespan="off",
            ws="none",
            access_log=False,
            log_config=None,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=max(1, int(drain_s)),
        )
        self._server = uvicorn.Server(config)
        self._task: asyncio.Task[None] | None = None

    @property
    def port(self) -> int:
        """The port that was taken."""
        return int(self._socket.getsockname()[1])

    @property
    def serving(self) -> bool:
        """False before `start` and once the server has ended, for whatever reason."""
        return self._task is not None and not self._task.done()

    def start(self) -> None:
        """Serve on the running loop. Connections made before its first turn wait in the socket's backlog."""
        self._task = asyncio.get_running_loop().create_task(self._server.serve(sockets=[self._socket]))

    async def stop(self) -> None:
        """Accept no more, let answers end within the drain time, cut the others."""
        self._server.should_exit = True
        if self._task is not None:
            await asyncio.gather(self._task, return_exceptions=True)
        self._socket.close()


def _bind(host: str, port: int, shared: bool) -> socket.socket:
    listening = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Inherited by connections. asyncio sets it only on sockets it made itself; without, small chunks wait 40 ms.
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if shared:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listening.bind((host, port))
        listening.listen(BACKLOG)
    except OSError:
        listening.close()
        raise
    return listening
