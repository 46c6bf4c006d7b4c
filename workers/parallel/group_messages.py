"""What ranks of a group say to each other beside step plans: typed messages, and their bytes with every field checked.

On the channel of steps rank 0 says what happens between steps (blocks with new content, KV sessions, the end); on the
control connection ranks meet, say that they live, and report. Plain data; knows neither sockets nor what anybody does
about a message. A refused message is a WireError that names message and field.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, get_args

import msgpack
import numpy as np
from numpy.typing import NDArray

from penstock.workers.errors import WireError
from penstock.workers.field_codecs import (
    Codec,
    addresses,
    column,
    exactly,
    integer,
    integers,
    octets,
    optional,
    real,
    unchanged,
)
from penstock.workers.protocol import Tokens

MAX_MESSAGE_BYTES = 32 << 20
MAX_CONTROL_BYTES = 1 << 18
_MAX_TEXT_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class Hello:
    """Follower, first on each of its two connections."""

    rank: int
    pid: int
    host_id: str
    steps: bool  # this is the connection for steps, to the rank's control connection that came before
    settings: str  # as JSON, without what may differ between ranks and without the key


@dataclass(frozen=True, slots=True)
class Accepted:
    """Rank 0: you are in. On the same host, open the connection for steps at `local_address`."""

    pid: int
    host_id: str
    local_address: str
    ring: bool  # on the connection for steps: the descriptor of shared memory follows


@dataclass(frozen=True, slots=True)
class Refused:
    """Rank 0: you cannot be a rank of this group."""

    message: str
    key: str


@dataclass(frozen=True, slots=True)
class StoreOpen:
    """Rank 0: the collectives' store is at host:port."""

    address: str


@dataclass(frozen=True, slots=True)
class Joined:
    """Follower: everything is loaded."""

    fingerprint: str  # of the checkpoint and the layout of its KV; equal on all ranks
    num_blocks: int
    transfer_address: str


@dataclass(frozen=True, slots=True)
class Ready:
    """Rank 0: all have joined; so many blocks are in use on every rank."""

    num_blocks: int


@dataclass(frozen=True, slots=True)
class Beat:
    """I live. `begun` and `done` count messages of the channel of steps."""

    begun: int
    done: int
    calls: int = 0  # collectives entered
    waiting: bool = False  # inside one
    steps: int = 0
    busy_s: float = 0.0  # spent in steps, without waiting for other ranks


@dataclass(frozen=True, slots=True)
class RankFailed:
    """Follower: I end, and this is why. `kind` is the error's class."""

    kind: str
    message: str
    key: str


@dataclass(frozen=True, slots=True)
class Stop:
    """Rank 0: end. `orderly`: all is done; else `message` says why, and `rank` who is at fault, where that is known."""

    orderly: bool
    rank: int | None
    message: str


@dataclass(frozen=True, slots=True)
class SessionOver:
    """Follower: the final event of a KV session of its transfer engine, by the name of the event's class."""

    session_id: bytes
    event: str
    reason: str
    cause: str
    tail: Tokens = ()  # of one that arrived
    fragments: int | None = None  # as in `port.Tail`


@dataclass(frozen=True, slots=True, eq=False)
class BlocksRenewed:
    """These blocks got new content since the last plan: their generations are now these."""

    blocks: NDArray[np.uint32]
    generations: NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class ExpectSession:
    """See `TransferPort.expect`. For the ranks of `bank`; block ids are those of their storages."""

    bank: int
    session_id: bytes
    epoch: int
    blocks: Tokens
    generations: tuple[int, ...]
    lease_s: float


@dataclass(frozen=True, slots=True)
class ForgetSession:
    """See `TransferPort.forget`."""

    session_id: bytes


@dataclass(frozen=True, slots=True)
class StartSession:
    """See `TransferPort.start`; the fields are those of the grant, `addresses` of the granter's ranks.

    For the ranks of `bank`; the others have no part in the session, whatever they hear of it.
    """

    bank: int
    session_id: bytes
    worker_id: str
    epoch: int
    addresses: tuple[str, ...]
    host_id: str
    first_block: int
    blocks: Tokens
    generations: tuple[int, ...]
    lease_s: float
    compatibility: str


@dataclass(frozen=True, slots=True)
class OfferBlocks:
    """See `TransferPort.offer`: fragment indices and blocks of the storages of the session's bank."""

    session_id: bytes
    fragments: Tokens
    blocks: Tokens


@dataclass(frozen=True, slots=True)
class FinishSession:
    """See `TransferPort.finish`."""

    session_id: bytes
    tail: Tokens
    fragments: int | None = None


@dataclass(frozen=True, slots=True)
class AbandonSession:
    """See `TransferPort.abandon`."""

    session_id: bytes
    reason: str


@dataclass(frozen=True, slots=True)
class MeetAgain:
    """Ranks are lost: meet the others as the group of this epoch, unless that is done already."""

    epoch: int


@dataclass(frozen=True, slots=True)
class PumpExperts:
    """There is no step to compute: let the experts' rebalancing go on without one."""


@dataclass(frozen=True, slots=True, eq=False)
class PutUpdate:
    """One projection of the adapter whose place this is from now on: y += scale * B (A x).

    A [rank, inputs] and B [outputs, rank], whole, as bytes of the group's dtype; rank 0: the adapter has none here.
    """

    place: int
    layer: int
    projection: str
    rank: int
    scale: float
    a: NDArray[np.uint8]
    b: NDArray[np.uint8]


GroupMessage = (
    Hello | Accepted | Refused | StoreOpen | Joined | Ready | Beat | RankFailed | Stop | SessionOver | BlocksRenewed
    | ExpectSession | ForgetSession | StartSession | OfferBlocks | FinishSession | AbandonSession | MeetAgain
    | PumpExperts | PutUpdate
)  # fmt: skip


def _unpack_text(value: Any) -> str:
    text: str = exactly(str, value)
    if len(text) > _MAX_TEXT_BYTES:
        raise ValueError(f"{len(text)} characters are more than {_MAX_TEXT_BYTES}")
    return text


_BY_ANNOTATION: dict[str, Codec] = {
    "int": integer(0, 2**63 - 1),
    "float": real(0.0, 1e12),
    "bool": Codec(unchanged, lambda value: exactly(bool, value)),
    "str": Codec(unchanged, _unpack_text),
    "bytes": octets(1, exact=16),  # session ids only
    "int | None": optional(integer(0, 2**63 - 1)),
    "Tokens": integers("i", "numbers"),
    "tuple[int, ...]": integers("Q", "generations"),
    "tuple[str, ...]": addresses(),
    "NDArray[np.uint8]": column("uint8"),
    "NDArray[np.uint32]": column("uint32"),
    "NDArray[np.uint64]": column("uint64"),
}
_KINDS: tuple[type, ...] = get_args(GroupMessage)  # a message's tag is its index here
_TAGS = {kind: tag for tag, kind in enumerate(_KINDS)}
_FIELDS = tuple(
    tuple((field.name, _BY_ANNOTATION[str(field.type)]) for field in dataclasses.fields(kind)) for kind in _KINDS
)


def encode_message(message: GroupMessage) -> bytes:
    """The message as bytes. Raises WireError when it would be larger than a peer accepts."""
    tag = _TAGS[type(message)]
    data: bytes = msgpack.packb([tag, *(codec.pack(getattr(message, name)) for name, codec in _FIELDS[tag])])
    if len(data) > MAX_MESSAGE_BYTES:
        raise WireError(f"{type(message).__name__}: {len(data)} bytes are more than {MAX_MESSAGE_BYTES}")
    return data


def decode_message(data: bytes) -> GroupMessage:
    """The message in `data`. Raises WireError."""
    if len(data) > MAX_MESSAGE_BYTES:
        raise WireError(f"a message of {len(data)} bytes is larger than {MAX_MESSAGE_BYTES}")
    try:
        values = msgpack.unpackb(data, max_array_len=16, max_map_len=0, max_ext_len=0, strict_map_key=True)
    except (ValueError, TypeError) as error:  # msgpack's own errors are ValueErrors
        raise WireError(f"not a message: {error}") from error
    if type(values) is not list or not values or type(values[0]) is not int or not 0 <= values[0] < len(_KINDS):
        raise WireError("not a message of a group")
    kind, fields = _KINDS[values[0]], _FIELDS[values[0]]
    if len(values) != len(fields) + 1:
        raise WireError(f"{kind.__name__}: expected {len(fields)} fields")
    taken = []
    for (name, codec), value in zip(fields, values[1:], strict=True):
        try:
            taken.append(codec.unpack(value))
        except ValueError as error:
            raise WireError(f"{kind.__name__}.{name}: {error!s:.200}") from error
    message: GroupMessage = kind(*taken)
    _check_lengths(message)
    return message


def _check_lengths(message: GroupMessage) -> None:
    match message:
        case BlocksRenewed() | ExpectSession() | StartSession():
            if len(message.blocks) != len(message.generations):
                raise WireError(f"{type(message).__name__}.generations: not one per block")
        case OfferBlocks() if len(message.fragments) != len(message.blocks):
            raise WireError("OfferBlocks.blocks: not one per fragment")
