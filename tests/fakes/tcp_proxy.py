"""A TCP proxy whose link a test can cut and heal, slow down, or break: what a network does between two processes.

Cut, bytes wait and nothing is reset (a partition, one way or both; whoever connects meanwhile is accepted and never
answered). `delay_s`, `jitter_s` (drawn from the seed) and `bytes_per_s` hold every piece back; pieces of one connection
keep their order, those of several overtake each other.
"""

from __future__ import annotations

import contextlib
import random
import selectors
import socket
import threading
import time


class TcpProxy:
    """Forwards connections on `address` to `target` (host:port). `cut` holds bytes back, one way or both."""

    def __init__(
        self, target: str, *, delay_s: float = 0.0, jitter_s: float = 0.0, bytes_per_s: float = 0.0, seed: int = 0
    ) -> None:
        self._delay_s, self._jitter_s, self._bytes_per_s = delay_s, jitter_s, bytes_per_s
        self._draw = random.Random(seed).random
        host, _, port = target.rpartition(":")
        self._target = host, int(port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._to_target, self._to_client = threading.Event(), threading.Event()
        self.heal()
        self._sockets = [self._listener]
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()
        self._stopping = False

    def cut(self, *, to_target: bool = True, to_client: bool = True) -> None:
        if to_target:
            self._to_target.clear()
        if to_client:
            self._to_client.clear()

    def heal(self) -> None:
        self._to_target.set()
        self._to_client.set()

    def break_connections(self) -> int:
        """Reset every connection that is open now; new ones are served. How many there were."""
        broken, self._sockets = self._sockets[1:], self._sockets[:1]
        for sock in broken:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        return len(broken) // 2

    def close(self) -> None:
        self._stopping = True
        self.heal()
        for sock in self._sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(5)
        for sock in self._sockets:
            sock.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            try:
                server = socket.create_connection(self._target)
            except OSError:  # nobody is there any more, and the sender hears so
                client.close()
                continue
            self._sockets += [client, server]
            for source, sink, gate in ((client, server, self._to_target), (server, client, self._to_client)):
                self._threads.append(threading.Thread(target=self._pump, args=(source, sink, gate), daemon=True))
                self._threads[-1].start()

    def _pump(self, source: socket.socket, sink: socket.socket, gate: threading.Event) -> None:
        with contextlib.suppress(OSError), selectors.DefaultSelector() as selector:
            selector.register(source, selectors.EVENT_READ)
            while True:
                selector.select()
                gate.wait()
                data = source.recv(1 << 16)
                if not data:
                    sink.shutdown(socket.SHUT_WR)
                    return
                held_s = self._delay_s + self._jitter_s * self._draw()
                held_s += len(data) / self._bytes_per_s if self._bytes_per_s else 0.0
                if held_s:
                    time.sleep(held_s)
                gate.wait()
                sink.sendall(data)
