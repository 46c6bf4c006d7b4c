"""The transfer thread of a worker: commands from the engine thread in, frames in and out, events back.

Built by worker start-up; implements `port.TransferPort` for the engine thread. Sessions live in `receiver.py` (granted
here) and `sender.py` (granted elsewhere), sockets in `socket_loop.py`; none of them runs on another thread than this.

A command is queued and the thread woken through an eventfd; an event is queued and the engine woken through `wake`.
Nothing polls: the thread sleeps until something arrives or a lease needs a look.

Open sessions early: the sender's pings, which keep the granter's lease alive, begin with `start`. A prefill worker
should therefore call it when it takes the request, not when the computation begins.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from penstock.workers.errors import ConfigError
from penstock.workers.protocol import Grant
from penstock.workers.settings import TransferSettings
from penstock.workers.tls import PeerTls
from penstock.workers.transfer.connection import ConnectionTerms
from penstock.workers.transfer.digests import POLICIES
from penstock.workers.transfer.endpoint import Channel, Endpoint, TransferCounters
from penstock.workers.transfer.head_slices import ALONE, HeadShare
from penstock.workers.transfer.port import BlockStorage, Incoming, Tail, TransferEvent
from penstock.workers.transfer.receiver import HANDSHAKE_TIMEOUT_S, Receiver
from penstock.workers.transfer.sender import Sender
from penstock.workers.transfer.socket_loop import SocketLoop

if TYPE_CHECKING:
    from penstock.workers.transfer.lane_frames import Lanes

TRANSPORTS = ("auto", "shared_memory", "tcp", "nccl")
SWEEPS_PER_LEASE = 8
MIN_FRAME_BYTES = 1 << 20
MIN_SOCKET_BUFFER_BYTES = 1 << 16
_STOPPED = "the transfer engine has stopped"
_log = logging.getLogger(__name__)


class TransferEngine:
    """See `TransferPort`. The listener is bound and the thread runs when the constructor returns.

    `cluster_key` is hex, as in WorkerSettings. Raises ConfigError for settings that cannot work.
    """

    def __init__(
        self,
        settings: TransferSettings,
        storage: BlockStorage,
        *,
        worker_id: str,
        epoch: int,
        host_id: str,
        compatibility: str,
        cluster_key: str,
        wake: Callable[[], None],
        clock: Callable[[], float],
        share: HeadShare = ALONE,
        pieces: int = 1,
        lanes: Lanes | None = None,
        tls: PeerTls | None = None,
    ) -> None:
        """`share` of the model's KV heads is in every block, in `pieces` runs of bytes.

        `lanes` for transport nccl; None: between GPUs, as only tests want others.
        """
        frame_bytes = min(settings.max_frame_bytes, storage.frame_bytes or settings.max_frame_bytes)
        _check(settings, storage.block_bytes)
        key = _key(cluster_key)
        if settings.transport == "nccl" and lanes is None:
            lanes = _nccl_lanes(settings, storage)
        self._lanes = lanes
        self._wake, self._clock = wake, clock
        self._commands: deque[Callable[[], None]] = deque()
        self._events: deque[TransferEvent] = deque()
        self._lock = threading.Lock()  # of `_closed`, `_signalled` going up, and the wake-up's descriptor
        self._signalled = self._stopping = self._closed = False
        self._next_sweep: float | None = None
        self._counters = TransferCounters()
        endpoint = Endpoint(
            settings,
            storage,
            worker_id,
            host_id,
            compatibility,
            self._emit,
            clock,
            self._counters,
            share,
            pieces,
            lanes,
            self._submit,
        )
        self._receiver = Receiver(endpoint)
        self._sender = Sender(endpoint, self._connect)
        self._sockets = SocketLoop(
            settings.host,
            settings.socket_buffer_bytes,
            self._receiver,
            lambda loop: ConnectionTerms(key, frame_bytes, loop.attend, self._sender.on_drained, self._catch_up),
            tls,
        )
        self._thread = threading.Thread(target=self._run, name=f"transfer-{worker_id}-{epoch}", daemon=True)
        self._thread.start()

    # --- TransferPort: called on the engine thread ------------------------------------------------------------------

    @property
    def address(self) -> str:
        """host:port on which peers reach this worker."""
        return self._sockets.address

    @property
    def alive(self) -> bool:
        """False once the thread has ended; every session has then failed, and new ones fail at once."""
        return self._thread.is_alive()

    def expect(self, session: Incoming) -> None:
        """Accept fragments for a session just granted; its lease starts when the thread takes the command."""

        def command() -> None:
            self._receiver.expect(session)
            self._sweep_within(session.lease_s)

        self._submit(command)

    def forget(self, session_id: bytes) -> None:
        """Stop accepting; answered by `IncomingClosed` unless another final event was already on its way."""
        self._submit(lambda: self._receiver.forget(session_id))

    def start(self, grant: Grant, bank: int = 0) -> None:
        """Open a session towards the granter, whose lease is renewed from now on. One rank has one bank."""

        def command() -> None:
            self._sender.start(grant)
            self._sweep_within(grant.lease_s)

        self._submit(command)

    def offer(self, session_id: bytes, fragments: Sequence[tuple[int, int]]) -> None:
        """Send complete blocks; they stay untouched until the session's end event."""
        pairs = tuple(fragments)
        self._submit(lambda: self._sender.offer(session_id, pairs))

    def probe(self, session_id: bytes) -> None:
        """Say by `OutgoingCaughtUp` when what was offered is at the peer."""
        self._submit(lambda: self._sender.probe(session_id))

    def finish(self, session_id: bytes, tail: Tail) -> None:
        """Everything was offered; the session completes once the peer has all of it."""
        self._submit(lambda: self._sender.finish(session_id, tail))

    def abandon(self, session_id: bytes, reason: str) -> None:
        """Give up; the peer is told, and the session ends in `OutgoingFailed`."""
        self._submit(lambda: self._sender.abandon(session_id, reason))

    def poll(self) -> list[TransferEvent]:
        """Events since the last call, oldest first."""
        events = []
        while self._events:
            events.append(self._events.popleft())
        return events

    def stats(self) -> TransferCounters:
        """A copy of the running totals."""
        return dataclasses.replace(self._counters)

    def stop(self) -> None:
        """End every session with its event, close everything and join the thread. Safe to call twice."""
        with self._lock:
            self._stopping = True
            if not self._closed:
                self._sockets.wake()
        self._thread.join()

    def _submit(self, command: Callable[[], None]) -> None:
        with self._lock:
            if self._closed:
                command()
                self._end_sessions()
                return
            self._commands.append(command)
            if not self._signalled:
                self._signalled = True
                self._sockets.wake()

    # --- the transfer thread --------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._turn()
        except Exception:  # noqa: BLE001 - the thread's edge: whatever it was, every session must still end
            _log.exception("the transfer thread failed")
        finally:
            self._shut_down()

    def _turn(self) -> None:
        timeout_s = None if self._next_sweep is None else max(0.0, self._next_sweep - self._clock())
        ready = self._sockets.wait(timeout_s)
        # After the wake-up was taken: a caller that still sees True has queued its command before `_catch_up` looks.
        self._signalled = False
        self._catch_up()
        if self._sockets.serve(ready):
            self._sweep_within(HANDSHAKE_TIMEOUT_S)
        if self._next_sweep is not None and self._clock() >= self._next_sweep:
            self._sweep()

    def _catch_up(self) -> None:
        while self._commands:
            self._commands.popleft()()

    def _sweep(self) -> None:
        now = self._clock()
        self._next_sweep = None
        for lease_s in (self._receiver.sweep(now), self._sender.sweep(now)):
            if lease_s is not None:
                self._sweep_within(lease_s)
        self._sockets.settle()

    def _sweep_within(self, lease_s: float) -> None:
        at = self._clock() + lease_s / SWEEPS_PER_LEASE
        self._next_sweep = at if self._next_sweep is None else min(self._next_sweep, at)

    def _emit(self, event: TransferEvent) -> None:
        self._events.append(event)
        self._wake()

    def _connect(self, address: str) -> Channel:
        if self._closed:
            raise ConnectionAbortedError(_STOPPED)
        return self._sockets.connect(address, self._sender)

    def _end_sessions(self) -> None:
        self._receiver.fail_all(_STOPPED)
        self._sender.fail_all(_STOPPED)

    def _shut_down(self) -> None:
        with self._lock:
            self._closed = True
            self._catch_up()
            self._end_sessions()
            self._sockets.close(_STOPPED)
        if self._lanes is not None:  # without the lock, which their threads may want for their last word
            self._lanes.close()


def _nccl_lanes(settings: TransferSettings, storage: BlockStorage) -> Lanes:
    # Late: it imports torch.
    from penstock.workers.transfer.lane_frames import nccl_lanes

    return nccl_lanes(settings, storage)


def _check(settings: TransferSettings, block_bytes: int) -> None:
    if settings.transport not in TRANSPORTS:
        raise ConfigError(f"transport is one of {', '.join(TRANSPORTS)}", key="transfer.transport")
    least = max(block_bytes, MIN_FRAME_BYTES)
    if settings.max_frame_bytes < least:
        raise ConfigError(f"a frame must hold {least} bytes of blocks", key="transfer.max_frame_bytes")
    if settings.digest not in POLICIES:
        raise ConfigError(f"digest is one of {', '.join(POLICIES)}", key="transfer.digest")
    if not 0.0 < settings.digest_sample <= 1.0:
        raise ConfigError("digest_sample is a share above 0 and up to 1", key="transfer.digest_sample")
    if settings.socket_buffer_bytes and settings.socket_buffer_bytes < MIN_SOCKET_BUFFER_BYTES:
        raise ConfigError(
            f"socket buffers have at least {MIN_SOCKET_BUFFER_BYTES} bytes, or 0", key="transfer.socket_buffer_bytes"
        )
    if not settings.lease_s > 0.0:
        raise ConfigError("a lease is longer than 0 s", key="transfer.lease_s")


def _key(cluster_key: str) -> bytes:
    try:
        return bytes.fromhex(cluster_key)
    except ValueError as error:
        raise ConfigError("the cluster key is not hex", key="cluster_key") from error
