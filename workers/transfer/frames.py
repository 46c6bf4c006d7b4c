"""Frames between two workers: a fixed header, authenticated before anything is allocated, then body and payload.

Used by `connection.py`, and by `workers/weights/link.py` for a vocabulary of its own. Each side opens with a preface
(magic, version, 16-byte nonce); both nonces and the cluster key give one key per direction, so a frame recorded on one
connection is void on every other, and the sequence number makes it void twice on the same one.

    header   48 bytes: magic, version, type, body bytes, payload bytes, sequence, session, epoch
    mac      32 bytes: HMAC-SHA256 over the header
    body     `body_bytes`, then HMAC-SHA256 over (mac, body) where there is a body
    payload  `payload_bytes` of KV blocks or weights; not authenticated, covered by digests in the (authenticated) body

The per-block generation and digest therefore sit in the body of `Offer`, since one frame carries many blocks.
Stateful: a `FrameSeal` counts one direction's frames; both ends must see every frame once and in order, as TCP gives.
"""

from __future__ import annotations

import hmac
import struct
from dataclasses import dataclass

from penstock.workers.errors import WireError
from penstock.workers.transfer.messages import (
    CODES,
    MAX_BODY_BYTES,
    NO_SESSION,
    SESSION_BYTES,
    Message,
    decode_body,
    encode_body,
    session_of,
)

MAGIC = b"PNSK"
TRANSFER_VERSION = 3  # of frames and `messages.py`; workers of different ones exchange no KV
NONCE_BYTES = 16
MAC_BYTES = 32
PREFACE = struct.Struct(f"<4sHH{NONCE_BYTES}s")
_HEADER = struct.Struct(f"<4sBBHIIQ{SESSION_BYTES}sQ")
HEADER_BYTES = _HEADER.size + MAC_BYTES


@dataclass(frozen=True, slots=True)
class Header:
    """A verified header; `mac` goes into the body's own."""

    code: int
    body_bytes: int  # without the body's mac
    payload_bytes: int
    session_id: bytes
    epoch: int
    mac: bytes

    @property
    def body_frame_bytes(self) -> int:
        """Bytes on the wire between this header and the payload."""
        return self.body_bytes + MAC_BYTES if self.body_bytes else 0


def preface(nonce: bytes) -> bytes:
    """What each side sends first."""
    return PREFACE.pack(MAGIC, TRANSFER_VERSION, 0, nonce)


def read_preface(data: bytes | bytearray) -> bytes:
    """The peer's nonce. Raises WireError when the peer speaks something else or another version."""
    magic, version, _, nonce = PREFACE.unpack(data)
    if magic != MAGIC:
        raise WireError("transfer: peer does not speak the transfer protocol")
    if version != TRANSFER_VERSION:
        raise WireError(f"transfer: peer speaks transfer version {version}, this worker {TRANSFER_VERSION}")
    return bytes(nonce)


def connection_keys(
    cluster_key: bytes, connector_nonce: bytes, listener_nonce: bytes, purpose: bytes = b"penstock transfer"
) -> tuple[bytes, bytes]:
    """(key of frames from connector to listener, key of the other direction); other purposes have other keys."""
    seed = hmac.digest(cluster_key, purpose + connector_nonce + listener_nonce, "sha256")
    return hmac.digest(seed, b"to listener", "sha256"), hmac.digest(seed, b"to connector", "sha256")


class FrameSeal:
    """Seals or opens the frames of one direction of one connection, in order."""

    def __init__(self, key: bytes, max_payload_bytes: int) -> None:
        self._key = key
        self._sequence = 0
        self._max_payload_bytes = max_payload_bytes

    def seal(self, message: Message, payload_bytes: int = 0) -> bytes:
        """Header and body of the next frame; the caller appends the payload."""
        return self.seal_body(CODES[type(message)], encode_body(message), payload_bytes, *session_of(message))

    def seal_body(
        self, code: int, body: bytes, payload_bytes: int = 0, session_id: bytes = NO_SESSION, epoch: int = 0
    ) -> bytes:
        """The same of a body that another vocabulary than that of KV transfers has encoded."""
        header = _HEADER.pack(
            MAGIC, TRANSFER_VERSION, code, 0, len(body), payload_bytes, self._sequence, session_id, epoch
        )
        self._sequence += 1
        mac = hmac.digest(self._key, header, "sha256")
        if not body:
            return header + mac
        return b"".join((header, mac, body, hmac.digest(self._key, mac + body, "sha256")))

    def open_header(self, data: bytes | bytearray | memoryview) -> Header:
        """Check HEADER_BYTES bytes as the next frame's header. Raises WireError."""
        header, mac = bytes(data[: _HEADER.size]), bytes(data[_HEADER.size :])
        if not hmac.compare_digest(mac, hmac.digest(self._key, header, "sha256")):
            raise WireError("transfer: frame is not authentic (another cluster key, or damaged)")
        magic, version, code, _, body_bytes, payload_bytes, sequence, session_id, epoch = _HEADER.unpack(header)
        if magic != MAGIC or version != TRANSFER_VERSION or sequence != self._sequence:
            raise WireError(f"transfer: frame {sequence} out of place, expected {self._sequence}")
        if body_bytes > MAX_BODY_BYTES or payload_bytes > self._max_payload_bytes:
            raise WireError(f"transfer: frame of {body_bytes} + {payload_bytes} bytes is over the limit")
        self._sequence += 1
        return Header(code, body_bytes, payload_bytes, session_id, epoch, mac)

    def open_body(self, header: Header, data: bytes | bytearray) -> Message:
        """Check and decode what followed the header (`body_frame_bytes` bytes). Raises WireError."""
        return decode_body(header.code, header.session_id, header.epoch, self.authentic_body(header, data))

    def authentic_body(self, header: Header, data: bytes | bytearray) -> bytes:
        """The body in what followed the header, checked and not decoded. Raises WireError."""
        body = bytes(data[: header.body_bytes])
        if header.body_bytes:
            mac = bytes(data[header.body_bytes :])
            if not hmac.compare_digest(mac, hmac.digest(self._key, header.mac + body, "sha256")):
                raise WireError("transfer: frame body is not authentic")
        return body
