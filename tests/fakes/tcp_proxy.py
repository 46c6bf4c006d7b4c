"""A TCP proxy whose link a test can cut and heal: bytes wait (a partition), nothing is reset."""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading


class TcpProxy:
    """Forwards connections on `address` to `target` (host:port). `cut` holds bytes back, one way or both."""

    def __init__(self, target: str) -> None:
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
                server = socket.create_connection(self._target)
            except OSError:
                return
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
                sink.sendall(data)
