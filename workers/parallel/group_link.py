"""One authenticated connection between two ranks of a group: whole frames, in order, each stamped epoch and sequence.

`meeting.py` makes two per follower: one carries steps, the other what concerns the group. The bodies are the callers'.
Each side opens with a preface (magic, version, 16-byte nonce); both nonces and the cluster key give one key per
direction, so that a frame recorded on one connection is void on every other.

    header   44 bytes: magic, version, kind, flags, body bytes, epoch, sequence, place, digest
    mac      32 bytes: HMAC-SHA256 over header and body
    body     as long as the header says; `place` and `digest` are of a body that travels beside the connection

A local connection, which nobody can get between, does without the macs once the peer has shown that it has the key
(`establish`).

Invariant: a frame of another incarnation of the group, or one that does not follow its predecessor, is an
IntegrityError at whoever receives it, who has then acted on nothing of it.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import socket
import struct
import threading
from typing import NamedTuple

from penstock.workers.errors import GroupError, IntegrityError, WireError

_MAGIC = b"PNSG"
_VERSION = 1
_NONCE_BYTES = 16
_PREFACE = struct.Struct(f"<4sB{_NONCE_BYTES}s")
_HEADER = struct.Struct("<4sBBHIQQQQ")
_HEADER_BYTES = _HEADER.size
_MAC_BYTES = 32
_READ_AHEAD_BYTES = 1 << 16


class Frame(NamedTuple):
    """What `GroupLink.receive` gives. `place` and `digest` mean what the kind says."""

    kind: int
    flags: int
    sequence: int
    body: bytearray
    place: int = 0
    digest: int = 0


class GroupLink:
    """A connected stream socket. One thread receives; `send` may be called by any."""

    def __init__(self, sock: socket.socket, cluster_key: str, epoch: int, max_body_bytes: int, *, opened: bool) -> None:
        """Exchange prefaces; blocks. `opened`: this side connected. Raises GroupError, WireError.

        A body's bytes are allocated before its frame is known to be authentic: keep the limit low until the peer is.
        """
        self._socket = sock
        self._epoch = epoch
        self.max_body_bytes = max_body_bytes
        self._lock = threading.Lock()  # of sending
        self._sent = self._received = 0
        self._mac_bytes = _MAC_BYTES
        self._ahead = memoryview(bytearray(_READ_AHEAD_BYTES))  # received and not yet asked for: [begin, end)
        self._begin = self._end = 0
        self._reads_ahead = False  # not before the peer can have sent a descriptor, which is for another reader
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        nonce = os.urandom(_NONCE_BYTES)
        self._write(_PREFACE.pack(_MAGIC, _VERSION, nonce))
        magic, version, other = _PREFACE.unpack(self._read(_PREFACE.size))
        if magic != _MAGIC or version != _VERSION:
            raise WireError("the peer does not speak the protocol of a group's ranks, or another version of it")
        first, second = (nonce, other) if opened else (other, nonce)
        seed = hmac.digest(bytes.fromhex(cluster_key), b"penstock group" + first + second, "sha256")
        keys = [hmac.digest(seed, b"from opener", "sha256"), hmac.digest(seed, b"to opener", "sha256")]
        self._key_out, self._key_in = keys if opened else keys[::-1]

    @property
    def local(self) -> bool:
        """The peer is on this host, as a socket that no other host can reach shows."""
        return self._socket.family == socket.AF_UNIX

    @property
    def socket(self) -> socket.socket:
        """For descriptors, time-outs and selectors."""
        return self._socket

    def establish(self, max_body_bytes: int) -> None:
        """Both ends, when they know each other and nothing is under way: larger bodies, and no macs on this host."""
        self.max_body_bytes = max_body_bytes
        self._reads_ahead = True
        if self.local:
            self._mac_bytes = 0

    def send(self, kind: int, body: bytes = b"", flags: int = 0, place: int = 0, digest: int = 0) -> int:
        """Send one frame; its sequence number. Raises GroupError when the peer is gone."""
        with self._lock:
            self._sent += 1
            data = _HEADER.pack(_MAGIC, _VERSION, kind, flags, len(body), self._epoch, self._sent, place, digest)
            if self._mac_bytes:
                data += hmac.digest(self._key_out, data + body, "sha256")
            self._write(data + body)
            return self._sent

    def receive(self) -> Frame:
        """The next frame; waits for it. Raises GroupError at the end of the connection, WireError, IntegrityError."""
        data = self._read(_HEADER_BYTES + self._mac_bytes)
        magic, version, kind, flags, body_bytes, epoch, sequence, place, digest = _HEADER.unpack_from(data)
        if magic != _MAGIC or version != _VERSION or body_bytes > self.max_body_bytes:
            raise WireError(f"no frame of a group, or one of {body_bytes} bytes where {self.max_body_bytes} may come")
        body = self._read(body_bytes) if body_bytes else bytearray()
        if self._mac_bytes:
            mac = hmac.digest(self._key_in, bytes(data[:_HEADER_BYTES]) + body, "sha256")
            if not hmac.compare_digest(data[_HEADER_BYTES:], mac):
                raise WireError("a frame is not authentic: another cluster key, or damaged")
        if epoch != self._epoch:
            raise IntegrityError(f"a frame of the group's incarnation {epoch}; this is incarnation {self._epoch}")
        if sequence != self._received + 1:
            raise IntegrityError(f"frame {sequence} follows frame {self._received}")
        self._received = sequence
        return Frame(kind, flags, sequence, body, place, digest)

    def close(self) -> None:
        """End the connection; a thread that waits in `receive` gets its GroupError. Safe to call twice."""
        with contextlib.suppress(OSError):  # the peer was first
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _write(self, data: bytes) -> None:
        try:
            self._socket.sendall(data)
        except OSError as error:
            raise GroupError(f"the connection to the other rank broke: {error}") from error

    def _read(self, size: int) -> bytearray:
        """Takes along what else has come, so that a frame is one call to the system and not two."""
        if self._begin == self._end and self._reads_ahead and size <= _READ_AHEAD_BYTES:
            self._end, self._begin = self._take(self._ahead), 0
        begin, have = self._begin, self._end - self._begin
        if have >= size:
            self._begin += size
            return bytearray(self._ahead[begin : begin + size])
        data = bytearray(size)
        data[:have] = self._ahead[begin : self._end]
        self._begin = self._end
        view = memoryview(data)
        while have < size:
            have += self._take(view[have:])
        return data

    def _take(self, view: memoryview) -> int:
        try:
            count = self._socket.recv_into(view)
        except OSError as error:
            raise GroupError(f"the connection to the other rank broke: {error}") from error
        if not count:
            raise GroupError("the other rank closed the connection")
        return count
