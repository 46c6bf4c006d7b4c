"""One blocking connection between a taker of weights and their source: whole frames, authenticated, payload apart.

`server.py` has one per taker, `peers.py` one per source. Frames are those of KV transfers (`transfer/frames.py`), under
keys of another purpose, so that neither can be taken for the other. A payload is as good as the digest in its frame's
body says, and whoever asked checks it.

Invariant: nothing is allocated for a frame whose header is not authentic, nor beyond `max_payload_bytes`.
"""

from __future__ import annotations

import contextlib
import os
import socket

from penstock.workers.errors import PeerError
from penstock.workers.transfer.frames import (
    HEADER_BYTES,
    NONCE_BYTES,
    PREFACE,
    FrameSeal,
    connection_keys,
    preface,
    read_preface,
)
from penstock.workers.weights.messages import WeightMessage, decode, encode

_PURPOSE = b"penstock weights"
_LOW_EFFORT = 0x20  # the network's class for what may wait (DSCP CS1): KV blocks and tokens go first


class WeightLink:
    """A connected TCP socket; one thread on each side. Every call may raise PeerError (it is gone) and WireError."""

    def __init__(self, sock: socket.socket, cluster_key: bytes, max_payload_bytes: int, *, opened: bool) -> None:
        """Exchange prefaces; blocks, as everything here, for at most the socket's time-out. `opened`: by this side."""
        self._socket = sock
        self._buffer = bytearray()
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with contextlib.suppress(OSError):  # a network without classes carries it all the same
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, _LOW_EFFORT)
        nonce = os.urandom(NONCE_BYTES)
        self._send([preface(nonce)])
        other = read_preface(self._read(PREFACE.size))
        nonces = (nonce, other) if opened else (other, nonce)
        to_listener, to_opener = connection_keys(cluster_key, *nonces, _PURPOSE)
        self._seal = FrameSeal(to_listener if opened else to_opener, 0)
        self._unseal = FrameSeal(to_opener if opened else to_listener, max_payload_bytes)

    def send(self, message: WeightMessage, payload: memoryview | None = None) -> None:
        """Send one frame."""
        code, body = encode(message)
        if payload is None:
            self._send([self._seal.seal_body(code, body)])
        else:
            self._send([self._seal.seal_body(code, body, len(payload)), payload])

    def receive(self) -> tuple[WeightMessage, memoryview]:
        """The next frame. Its payload stays valid until the next call."""
        header = self._unseal.open_header(self._read(HEADER_BYTES))
        body = self._unseal.authentic_body(header, self._read(header.body_frame_bytes))
        message = decode(header.code, body)
        if len(self._buffer) < header.payload_bytes:
            self._buffer = bytearray(header.payload_bytes)
        payload = memoryview(self._buffer)[: header.payload_bytes]
        self._fill(payload)
        return message, payload

    def close(self) -> None:
        """End the connection; a thread that waits in it gets its PeerError. Safe to call twice."""
        with contextlib.suppress(OSError):  # the peer was first
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _send(self, parts: list[bytes | memoryview]) -> None:
        try:
            for part in parts:
                self._socket.sendall(part)
        except OSError as error:
            raise _gone(error) from error

    def _read(self, size: int) -> bytearray:
        data = bytearray(size)
        self._fill(memoryview(data))
        return data

    def _fill(self, view: memoryview) -> None:
        have = 0
        while have < len(view):
            try:
                count = self._socket.recv_into(view[have:])
            except OSError as error:
                raise _gone(error) from error
            if not count:
                raise PeerError("it closed the connection", pause_s=2.0)
            have += count


def _gone(error: OSError) -> PeerError:
    if isinstance(error, TimeoutError):
        return PeerError("it gave nothing for too long", pause_s=10.0)
    return PeerError(f"the connection broke: {error.strerror or error}", pause_s=2.0)
