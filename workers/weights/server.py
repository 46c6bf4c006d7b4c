"""Gives the weights of a running worker to others that start: a listener, and a thread for each taker it admits.

`supply.py` starts one beside a worker whose checkpoint lies in files, or that keeps a copy of what it takes; the
worker's assembly tells it when to give way and when to stop. Serving must not notice it: never the engine's thread, few
takers at a time under one pace, low priority of threads and packets, slower while KV blocks move, nobody once the
worker drains. Who comes beyond the bound is sent on to earlier takers that have a copy, so that takers form a tree.

Invariant: at most `max_takers` connections are answered; no bytes go to one that has not shown the cluster key.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
from collections import deque
from collections.abc import Callable

from xxhash import xxh3_64_intdigest

from penstock.workers.errors import PeerError, WireError
from penstock.workers.settings import WeightSettings
from penstock.workers.tls import PeerTls
from penstock.workers.transfer.socket_loop import listen_on, numeric_address
from penstock.workers.weights.link import WeightLink
from penstock.workers.weights.messages import Absent, Greeting, Piece, Refusal, Want, WantConfig, WeightMessage
from penstock.workers.weights.pace import Pace
from penstock.workers.weights.runs import Run
from penstock.workers.weights.stored import Scratch, WeightStore

log = logging.getLogger(__name__)

_HELLO_S = 5.0  # for preface and greeting
_IDLE_S = 30.0  # a taker that asks for nothing so long makes room for another
_WAITING = 16  # connections that have not been looked at
_REFERRALS = 8
_LOW_PRIORITY = 10  # niceness of the threads that serve


class WeightServer:
    """Listens from the moment it exists. Raises ConfigError for a host that cannot be listened on."""

    def __init__(
        self, store: WeightStore, host: str, cluster_key: str, settings: WeightSettings, tls: PeerTls | None = None
    ) -> None:
        self._store = store
        self._tls = tls
        self._key = bytes.fromhex(cluster_key)
        self._max_takers = settings.max_takers
        self._pace = Pace(settings.serve_bytes_per_s)
        self._lock = threading.Lock()
        self._links: set[WeightLink] = set()  # of takers that were admitted
        self._sockets: set[socket.socket] = set()  # of all
        self._copies: deque[str] = deque(maxlen=_REFERRALS)  # where earlier takers serve what they have got
        self._closed = ""  # why nobody is served any more
        self._stopped = False
        self.served_bytes = 0
        self._listener = listen_on(host)
        self._listener.settimeout(None)
        self.address = numeric_address(self._listener.getsockname())
        self._greetings = threading.BoundedSemaphore(_WAITING)
        threading.Thread(target=self._listen, name="weights", daemon=True).start()

    def give_way_to(self, busy: Callable[[], bool]) -> None:
        """Be slower while `busy()`; called often, and from any thread."""
        self._pace.busy = busy

    def close(self, reason: str) -> None:
        """Serve nobody any more; takers hear why and go elsewhere. Safe to call twice."""
        self._closed = self._closed or reason

    def stop(self) -> None:
        """Close, cut every connection and the listener. Safe to call twice."""
        self.close("the worker ends")
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            self._stopped = True
            for sock in self._sockets:
                _cut(sock)

    def _listen(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            if self._tls is not None:
                try:  # says nothing yet; the handshake is the taker's thread's
                    sock = self._tls.accepting.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
                except OSError:  # it has gone again
                    sock.close()
                    continue
            with self._lock:
                self._sockets.add(sock)
                stopped = self._stopped
            if stopped or not self._greetings.acquire(blocking=False):
                self._forget(sock)
                continue
            threading.Thread(target=self._serve, args=(sock,), name="weights-taker", daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        """One taker, from its preface to its end."""
        take_low_priority()
        waiting = True
        try:
            sock.settimeout(_HELLO_S)
            link = WeightLink(sock, self._key, 0, opened=False)
            greeting, _ = link.receive()
            self._greetings.release()
            waiting = False
            sock.settimeout(_IDLE_S)
            self._answer_greeting(link, greeting)
        except (PeerError, WireError) as error:
            if not self._closed:
                log.debug("a taker of weights is gone: %s", error)
        finally:
            if waiting:
                self._greetings.release()
            self._forget(sock)

    def _forget(self, sock: socket.socket) -> None:
        with self._lock:
            self._sockets.discard(sock)
        sock.close()

    def _answer_greeting(self, link: WeightLink, greeting: WeightMessage) -> None:
        if not isinstance(greeting, Greeting):
            raise WireError("a taker of weights begins with something else than a greeting")
        refusal = self._admit(link, greeting)
        if refusal is not None:
            link.send(refusal)
            return
        try:
            link.send(self._store.terms)
            scratch = Scratch()
            while not self._closed:
                self._answer(link, scratch)
            link.send(Refusal(True, self._closed))
        except PeerError as error:
            # Of its own store, where the link still stands: the taker should know why.
            with contextlib.suppress(PeerError):
                link.send(Refusal(False, str(error)))
            raise
        finally:
            with self._lock:
                self._links.discard(link)

    def _admit(self, link: WeightLink, greeting: Greeting) -> Refusal | None:
        if greeting.revision not in ("", self._store.terms.revision):
            return Refusal(False, f"it serves another checkpoint, revision {self._store.terms.revision}")
        with self._lock:
            if self._closed:
                return Refusal(True, self._closed)
            if len(self._links) >= self._max_takers:
                others = tuple(address for address in self._copies if address != greeting.address)
                return Refusal(True, f"it serves {len(self._links)} others", others)
            self._links.add(link)
            if greeting.address and greeting.address not in self._copies:
                self._copies.append(greeting.address)
        return None

    def _answer(self, link: WeightLink, scratch: Scratch) -> None:
        match link.receive()[0]:
            case Want(file, begin, length, stride, count):
                run, files = Run(begin, length, stride, count), self._store.terms.files
                if file >= len(files) or not run.allowed or run.end > files[file].size:
                    raise WireError(f"a taker of weights asks for {run} of file {file}")
                payload = self._store.read(file, run, scratch)
            case WantConfig():
                payload = memoryview(self._store.config)
            case other:
                raise WireError(f"a taker of weights says {type(other).__name__}")
        if payload is None:
            link.send(Absent())
            return
        self._pace.take(len(payload))
        with self._lock:
            self.served_bytes += len(payload)
        link.send(Piece(xxh3_64_intdigest(payload)), payload)


def _cut(sock: socket.socket) -> None:
    """Whoever waits for it wakes up."""
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


def take_low_priority() -> None:
    """Let this thread compute only what others leave; on Linux a priority is of a thread."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOW_PRIORITY)
