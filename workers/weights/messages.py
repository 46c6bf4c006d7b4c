"""What a taker of weights (T) and their source (S) say to each other, and each message's body in bytes.

    T -> S   Greeting, then any number of Want and WantConfig, several of them ahead of their answers
    S -> T   Terms or Refusal; then to each Want, in order, Piece (with the bytes) or Absent; Refusal to end it

Plain data with every field checked on the way in; a body that is not exactly what its type says is a WireError. Knows
neither sockets nor files.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, get_args

import msgpack

from penstock.workers.errors import WireError
from penstock.workers.field_codecs import Codec, addresses, exactly, integer, unchanged, unpack_text

MAX_FILES = 4096
_DIGEST_BYTES = 32
_MAX_NAME_CHARS = 255


@dataclass(frozen=True, slots=True)
class Greeting:
    """T's first message. `revision` is of the checkpoint it loads; empty: it has none and takes what there is."""

    revision: str
    address: str  # where T itself serves what it has got so far; empty: nowhere


@dataclass(frozen=True, slots=True)
class ServedFile:
    """One safetensors file of a checkpoint. Both digests are SHA-256: of its header, and of header and samples."""

    name: str
    size: int
    header_digest: bytes
    digest: bytes


@dataclass(frozen=True, slots=True)
class Terms:
    """S serves T. Files are asked for by their place in `files`."""

    revision: str
    config_bytes: int
    files: tuple[ServedFile, ...]


@dataclass(frozen=True, slots=True)
class Refusal:
    """S does not serve T, now (`busy`: try again, or ask `referrals`) or for good; the connection ends."""

    busy: bool
    reason: str
    referrals: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Want:
    """T wants these bytes of a file; see `Run`."""

    file: int
    begin: int
    length: int
    stride: int
    count: int


@dataclass(frozen=True, slots=True)
class WantConfig:
    """T wants `config.json`."""


@dataclass(frozen=True, slots=True)
class Piece:
    """The bytes follow the frame; `digest` is xxh3_64 of them."""

    digest: int


@dataclass(frozen=True, slots=True)
class Absent:
    """S does not have these bytes (yet)."""


WeightMessage = Greeting | Terms | Refusal | Want | WantConfig | Piece | Absent


def _pack_files(files: tuple[ServedFile, ...]) -> list[list[Any]]:
    return [[file.name, file.size, file.header_digest, file.digest] for file in files]


def _unpack_files(value: Any) -> tuple[ServedFile, ...]:
    rows: list[Any] = exactly(list, value)
    if not 0 < len(rows) <= MAX_FILES:
        raise ValueError(f"{len(rows)} files")
    return tuple(_unpack_file(row) for row in rows)


def _unpack_file(row: Any) -> ServedFile:
    if type(row) is not list or [type(each) for each in row] != [str, int, bytes, bytes]:
        raise ValueError("a file is a name, a size and two digests")
    name, size, *digests = row
    plain = 0 < len(name) <= _MAX_NAME_CHARS and name[0] != "." and not any(c in name for c in "/\\\0")
    if not plain or not name.endswith(".safetensors"):
        raise ValueError(f"{name[:_MAX_NAME_CHARS]!r} is no plain .safetensors file name")
    if not 8 <= size < 1 << 62 or any(len(digest) != _DIGEST_BYTES for digest in digests):
        raise ValueError(f"{name}: a size or a digest is out of range")
    return ServedFile(name, size, *digests)


_BY_ANNOTATION: dict[str, Codec] = {
    "int": integer(0, 2**64 - 1),
    "bool": Codec(unchanged, lambda value: exactly(bool, value)),
    "str": Codec(unchanged, unpack_text),
    "tuple[str, ...]": addresses(),
    "tuple[ServedFile, ...]": Codec(_pack_files, _unpack_files),
}
_KINDS: tuple[type, ...] = get_args(WeightMessage)  # a message's code is its index here
_CODES = {kind: code for code, kind in enumerate(_KINDS)}
_FIELDS = tuple(
    tuple((field.name, _BY_ANNOTATION[str(field.type)]) for field in dataclasses.fields(kind)) for kind in _KINDS
)


def encode(message: WeightMessage) -> tuple[int, bytes]:
    """Code and body."""
    code = _CODES[type(message)]
    body: bytes = msgpack.packb([codec.pack(getattr(message, name)) for name, codec in _FIELDS[code]])
    return code, body


def decode(code: int, body: bytes) -> WeightMessage:
    """Inverse of `encode`. Raises WireError naming message and field."""
    if code >= len(_KINDS):
        raise WireError(f"weights: unknown message {code}")
    kind, fields = _KINDS[code], _FIELDS[code]
    try:
        values = msgpack.unpackb(body, max_array_len=MAX_FILES, max_map_len=0, max_ext_len=0)
    except (ValueError, TypeError) as error:  # msgpack's own errors are ValueErrors
        raise WireError(f"weights: {kind.__name__}: {error}") from error
    if type(values) is not list or len(values) != len(fields):
        raise WireError(f"weights: {kind.__name__}: expected {len(fields)} fields")
    taken = []
    for (name, codec), value in zip(fields, values, strict=True):
        try:
            taken.append(codec.unpack(value))
        except ValueError as error:
            raise WireError(f"weights: {kind.__name__}.{name}: {error!s:.300}") from error
    message: WeightMessage = kind(*taken)
    return message
