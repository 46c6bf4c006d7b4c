"""What the two ends of a KV transfer say to each other, and each message's body in bytes.

Used by `sender.py`, `receiver.py` and `connection.py`. P is the sending (prefill) worker and opens the connection,
D the receiving (decode) worker that granted the sessions:

    P -> D   Hello, then per session Open, Offer ..., Finish; Abandon to give up; Ping
    D -> P   Welcome or Goodbye, then per session Ack at the end; Missing to ask again; Reject to refuse; Pong

Session id and epoch travel in the frame's header (`frames.py`), the other fields as one msgpack list. Nothing here
knows sockets, leases or blocks' bytes. A body that is not exactly what its type says raises WireError.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgpack
import numpy as np
from numpy.typing import NDArray

from penstock.workers.errors import WireError
from penstock.workers.protocol import Tokens
from penstock.workers.transfer.head_slices import ALONE, HeadRange

SESSION_BYTES = 16
NO_SESSION = b"\0" * SESSION_BYTES
MAX_BODY_BYTES = 1 << 20
MAX_TEXT = 4096
MAX_OFFER_ENTRIES = 1024
MAX_HEADS = 1 << 16
_MAX_FIELDS = 11

# One row per block: `digest` is xxh3_64 of its bytes where `checked` is 1; `source_block` and `source_generation`
# name it in P's pool, `target_generation` repeats the grant's number for the block of D it is meant for.
OFFER_DTYPE = np.dtype(
    [
        ("fragment", "<u4"),
        ("checked", "<u4"),
        ("source_block", "<u4"),
        ("source_generation", "<u8"),
        ("target_generation", "<u8"),
        ("digest", "<u8"),
    ]
)


@dataclass(frozen=True, slots=True)
class Hello:
    """P's first message. `segment` is the path of its KV storage for readers on the same host; empty = TCP only.

    `held` are the KV heads in P's blocks of `block_bytes`, `sent` those of them that this connection announces. `lane`:
    their bytes travel on a lane beside it (`lane_frames.py`).
    """

    worker_id: str
    compatibility: str
    host_id: str
    segment: str
    num_blocks: int
    block_bytes: int
    held: HeadRange = ALONE.heads
    sent: HeadRange = ALONE.heads
    lane: bool = False


@dataclass(frozen=True, slots=True)
class Welcome:
    """D takes P's sessions; with `shared_memory` D copies blocks from P's segment, else P sends their bytes.

    D can take `frame_bytes` of blocks at once; 0 = any number. `invitation`: to the lane that they travel on.
    """

    shared_memory: bool
    frame_bytes: int = 0
    invitation: str = ""


@dataclass(frozen=True, slots=True)
class Goodbye:
    """D will not talk to this peer; the connection ends."""

    reason: str


@dataclass(frozen=True, slots=True)
class Open:
    """P has the grant; from now on P's pings renew the session's lease."""

    session_id: bytes
    epoch: int


@dataclass(frozen=True, slots=True, eq=False)
class Offer:
    """Blocks whose KV is complete. `inline`: their bytes follow the frame, in order."""

    session_id: bytes
    epoch: int
    inline: bool
    entries: NDArray[np.void]  # OFFER_DTYPE


@dataclass(frozen=True, slots=True)
class Finish:
    """P has offered everything; `tokens` are what it sampled. Repeated after every answer to `Missing`.

    `fragments`: a running sequence fills only so many of the granted blocks; sent to peers that asked for one only.
    """

    session_id: bytes
    epoch: int
    tokens: Tokens
    fragments: int | None = None


@dataclass(frozen=True, slots=True)
class Abandon:
    """P gives the session up."""

    session_id: bytes
    epoch: int
    reason: str


@dataclass(frozen=True, slots=True)
class Ping:
    """P lives; renews the lease of every session open on this connection."""


@dataclass(frozen=True, slots=True)
class Pong:
    """D lives."""


@dataclass(frozen=True, slots=True)
class Ack:
    """D has all of the session, verified; P may reuse its blocks."""

    session_id: bytes
    epoch: int


@dataclass(frozen=True, slots=True)
class Missing:
    """D saw the session's Finish without these fragments (lost, or their digest was wrong); P offers them again."""

    session_id: bytes
    epoch: int
    fragments: Tokens


@dataclass(frozen=True, slots=True)
class Reject:
    """D does not know the session, or has ended it."""

    session_id: bytes
    epoch: int
    reason: str


Message = Hello | Welcome | Goodbye | Open | Offer | Finish | Abandon | Ping | Pong | Ack | Missing | Reject
CODES: dict[type[Message], int] = {
    Hello: 1,
    Welcome: 2,
    Goodbye: 3,
    Open: 4,
    Offer: 5,
    Finish: 6,
    Abandon: 7,
    Ping: 8,
    Pong: 9,
    Ack: 10,
    Missing: 11,
    Reject: 12,
}


def session_of(message: Message) -> tuple[bytes, int]:
    """(session id, epoch) of a message; zeros for those that concern the connection."""
    if isinstance(message, (Hello, Welcome, Goodbye, Ping, Pong)):
        return NO_SESSION, 0
    return message.session_id, message.epoch


def encode_body(message: Message) -> bytes:
    """The fields beside session id and epoch; empty for messages that have none."""
    match message:
        case Hello(worker_id, compatibility, host_id, segment, num_blocks, block_bytes, held, sent, lane):
            fields: list[object] = [worker_id, compatibility, host_id, segment, num_blocks, block_bytes]
            fields += [held.first, held.count, sent.first, sent.count, lane]
        case Welcome(shared_memory, frame_bytes, invitation):
            fields = [shared_memory, frame_bytes, invitation]
        case Goodbye(reason) | Abandon(reason=reason) | Reject(reason=reason):
            fields = [reason[: MAX_TEXT // 4]]
        case Offer(inline=inline, entries=entries):
            fields = [inline, entries.tobytes()]
        case Finish(tokens=numbers, fragments=int() as count):
            fields = [np.asarray(numbers, "<i4").tobytes(), count]
        case Finish(tokens=numbers) | Missing(fragments=numbers):
            fields = [np.asarray(numbers, "<i4").tobytes()]
        case _:
            return b""
    body: bytes = msgpack.packb(fields)
    return body


def decode_body(code: int, session_id: bytes, epoch: int, body: bytes | bytearray) -> Message:
    """Inverse of `encode_body`; checks every type and length. Raises WireError."""
    try:
        fields = (
            msgpack.unpackb(body, use_list=False, max_str_len=MAX_TEXT, max_array_len=_MAX_FIELDS, max_map_len=0)
            if body
            else ()
        )
    except (ValueError, msgpack.UnpackException) as error:
        raise WireError(f"transfer message {code}: {error}") from error
    reader = _Fields(code, fields)
    message = _build(code, session_id, epoch, reader)
    reader.end()
    return message


def _build(code: int, session_id: bytes, epoch: int, read: _Fields) -> Message:
    match code:
        case 1:
            names = read.text(), read.text(), read.text(), read.text()
            return Hello(*names, read.integer(), read.integer(), read.heads(), read.heads(), read.flag())
        case 2:
            return Welcome(read.flag(), read.integer(), read.text())
        case 3:
            return Goodbye(read.text())
        case 4:
            return Open(session_id, epoch)
        case 5:
            return Offer(session_id, epoch, read.flag(), read.entries())
        case 6:
            return Finish(session_id, epoch, read.numbers(), read.integer() if read.more else None)
        case 7:
            return Abandon(session_id, epoch, read.text())
        case 8:
            return Ping()
        case 9:
            return Pong()
        case 10:
            return Ack(session_id, epoch)
        case 11:
            return Missing(session_id, epoch, read.numbers())
        case 12:
            return Reject(session_id, epoch, read.text())
        case _:
            raise WireError(f"transfer message: unknown type {code}")


class _Fields:
    """Reads one decoded body field by field; a wrong type or count is a WireError that names the place."""

    def __init__(self, code: int, fields: object) -> None:
        self._code = code
        self._fields = fields if isinstance(fields, tuple) else (fields,)
        self._next = 0

    def _take(self, kind: type) -> object:
        position = self._next
        self._next += 1
        value = self._fields[position] if position < len(self._fields) else None
        if type(value) is not kind:
            raise WireError(f"transfer message {self._code}, field {position}: expected {kind.__name__}")
        return value

    @property
    def more(self) -> bool:
        """Whether a field is left."""
        return self._next < len(self._fields)

    def text(self) -> str:
        return str(self._take(str))

    def flag(self) -> bool:
        return bool(self._take(bool))

    def integer(self) -> int:
        value = self._take(int)
        if not isinstance(value, int) or value < 0:
            raise WireError(f"transfer message {self._code}: negative number")
        return value

    def heads(self) -> HeadRange:
        first, count = self.integer(), self.integer()
        if max(first, count) > MAX_HEADS or count == 0:
            raise WireError(f"transfer message {self._code}: {count} heads from {first} on")
        return HeadRange(first, count)

    def numbers(self) -> Tokens:
        return tuple(np.frombuffer(self._bytes(4), "<i4").tolist())

    def entries(self) -> NDArray[np.void]:
        entries: NDArray[np.void] = np.frombuffer(self._bytes(OFFER_DTYPE.itemsize), OFFER_DTYPE)
        if not 1 <= len(entries) <= MAX_OFFER_ENTRIES:
            raise WireError(f"transfer message {self._code}: {len(entries)} entries")
        return entries

    def _bytes(self, itemsize: int) -> bytes:
        value = self._take(bytes)
        if not isinstance(value, bytes) or len(value) % itemsize:
            raise WireError(f"transfer message {self._code}: not a multiple of {itemsize} bytes")
        return value

    def end(self) -> None:
        if self._next != len(self._fields):
            raise WireError(f"transfer message {self._code}: {len(self._fields)} fields, expected {self._next}")
