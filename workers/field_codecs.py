"""How single fields of a message travel: to plain msgpack values, and back with every type and range checked.

`wire.py` builds its schemas from these. A codec knows neither the message nor the field; a wrong value is a
ValueError with the reason, to which `wire.py` adds the place. Sizes are checked before anything is allocated.
"""

from __future__ import annotations

import itertools
import math
import sys
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penstock.workers.grammar_spec import GrammarKind
from penstock.workers.protocol import FailureCode, PackedTokens, Role

MAX_TEXT_BYTES = 64 << 10
MAX_TOKENS = 4 << 20


@dataclass(frozen=True, slots=True)
class Codec:
    """How one field travels. `unpack` gets the plain value and raises ValueError with the reason."""

    pack: Callable[[Any], Any]
    unpack: Callable[[Any], Any]


def unchanged(value: Any) -> Any:
    """Packs what msgpack knows by itself."""
    return value


def exactly(kind: type, value: Any) -> Any:
    """The value, if it is of this very type: a bool is no int here."""
    if type(value) is not kind:
        raise ValueError(f"expected {kind.__name__}, got {type(value).__name__}")
    return value


def integer(low: int, high: int) -> Codec:
    """An int within [low, high]."""

    def unpack(value: Any) -> int:
        if type(value) is not int:
            raise ValueError(f"expected int, got {type(value).__name__}")
        if not low <= value <= high:
            raise ValueError(f"{value} is outside [{low}, {high}]")
        return value

    return Codec(unchanged, unpack)


def real(low: float, high: float) -> Codec:
    """A finite float within [low, high]; an int is taken for one."""

    def unpack(value: Any) -> float:
        if type(value) is not float and type(value) is not int:
            raise ValueError(f"expected float, got {type(value).__name__}")
        if not (math.isfinite(value) and low <= value <= high):
            raise ValueError(f"{value} is outside [{low}, {high}]")
        return float(value)

    return Codec(unchanged, unpack)


def unpack_text(value: Any) -> str:
    """A string of bounded length."""
    text: str = exactly(str, value)
    if len(text) > MAX_TEXT_BYTES:
        raise ValueError(f"{len(text)} characters are more than {MAX_TEXT_BYTES}")
    return text


def octets(multiple: int, exact: int | None = None) -> Codec:
    """Bytes whose length is a multiple, or an exact number."""

    def unpack(value: Any) -> bytes:
        data: bytes = exactly(bytes, value)
        if exact is not None and len(data) != exact:
            raise ValueError(f"{len(data)} bytes instead of {exact}")
        if len(data) % multiple:
            raise ValueError(f"{len(data)} bytes are no multiple of {multiple}")
        return data

    return Codec(unchanged, unpack)


def tokens() -> Codec:
    """A tuple of token ids as little-endian int32; what is read keeps its array beside the tuple."""
    plain = integers("i", "tokens")

    def unpack(value: Any) -> PackedTokens:
        data: bytes = exactly(bytes, value)
        if len(data) % 4:
            raise ValueError(f"{len(data)} bytes are no multiple of 4")
        if len(data) > MAX_TOKENS * 4:
            raise ValueError(f"{len(data) // 4} tokens are more than {MAX_TOKENS}")
        packed = np.frombuffer(data, "<i4")
        if packed.min(initial=0) < 0:
            raise ValueError("negative tokens")
        read = PackedTokens(packed.tolist())
        read.packed = packed.astype(np.int32, copy=False)
        read.largest = int(packed.max(initial=0))
        return read

    return Codec(plain.pack, unpack)


def integers(typecode: str, what: str) -> Codec:
    """A tuple of non-negative integers as packed little-endian bytes."""
    width = array(typecode).itemsize

    def pack(values: tuple[int, ...]) -> bytes:
        packed = array(typecode, values)
        if sys.byteorder == "big":
            packed.byteswap()
        return packed.tobytes()

    def unpack(value: Any) -> tuple[int, ...]:
        data: bytes = exactly(bytes, value)
        if len(data) % width:
            raise ValueError(f"{len(data)} bytes are no multiple of {width}")
        if len(data) > MAX_TOKENS * width:
            raise ValueError(f"{len(data) // width} {what} are more than {MAX_TOKENS}")
        packed = array(typecode)
        packed.frombytes(data)
        if sys.byteorder == "big":
            packed.byteswap()
        values = tuple(packed)
        if values and min(values) < 0:
            raise ValueError(f"negative {what}")
        return values

    return Codec(pack, unpack)


def column(dtype: str) -> Codec:
    """A numpy column as its raw little-endian bytes; the decoded one is read-only and copies nothing."""
    kind = np.dtype(dtype)
    if sys.byteorder == "big":
        kind = kind.newbyteorder("<")

    def pack(values: NDArray[Any]) -> bytes:
        if values.dtype is not kind and values.dtype != kind:
            raise ValueError(f"dtype {values.dtype} instead of {kind}")
        return values.tobytes()

    def unpack(value: Any) -> NDArray[Any]:
        data: bytes = exactly(bytes, value)
        if len(data) % kind.itemsize:
            raise ValueError(f"{len(data)} bytes are no multiple of {kind.itemsize}")
        return np.frombuffer(data, kind)

    return Codec(pack, unpack)


def biases() -> Codec:
    """Pairs of token id and float, as little-endian bytes: all ids (int32), then all values (float32)."""

    def pack(pairs: tuple[tuple[int, float], ...]) -> bytes:
        ids = np.array([token for token, _ in pairs], "<i4")
        return ids.tobytes() + np.array([value for _, value in pairs], "<f4").tobytes()

    def unpack(value: Any) -> tuple[tuple[int, float], ...]:
        data: bytes = exactly(bytes, value)
        if len(data) % 8 or len(data) > MAX_TOKENS * 8:
            raise ValueError(f"{len(data)} bytes are no list of token biases")
        ids = np.frombuffer(data, "<i4", len(data) // 8)
        values = np.frombuffer(data, "<f4", len(data) // 8, offset=len(data) // 2)
        if len(ids) and (int(ids.min()) < 0 or not np.isfinite(values).all()):
            raise ValueError("a token bias has a negative id or no finite value")
        return tuple(zip(ids.tolist(), values.tolist(), strict=True))

    return Codec(pack, unpack)


def sequences() -> Codec:
    """Token sequences as bytes of int32: their number, their lengths, then their tokens."""
    flat = integers("i", "tokens")

    def pack(values: tuple[tuple[int, ...], ...]) -> Any:
        return flat.pack((len(values), *map(len, values), *(token for one in values for token in one)))

    def unpack(value: Any) -> tuple[tuple[int, ...], ...]:
        numbers: tuple[int, ...] = flat.unpack(value)
        count = numbers[0] if numbers else 0
        lengths, tokens = numbers[1 : 1 + count], numbers[1 + count :]
        if not numbers or len(lengths) != count or sum(lengths) != len(tokens):
            raise ValueError("lengths do not match the tokens")
        ends = list(itertools.accumulate(lengths))
        return tuple(tokens[end - length : end] for end, length in zip(ends, lengths, strict=True))

    return Codec(pack, unpack)


def addresses() -> Codec:
    """A tuple of host:port texts, none of which holds a comma, as one text."""

    def unpack(value: Any) -> tuple[str, ...]:
        text = unpack_text(value)
        found = tuple(text.split(",")) if text else ()
        if not all(found):
            raise ValueError("an address is empty")
        return found

    return Codec(",".join, unpack)


def optional(codec: Codec) -> Codec:
    """None, or what `codec` carries."""
    return Codec(
        lambda value: None if value is None else codec.pack(value),
        lambda value: None if value is None else codec.unpack(value),
    )


def choice(kind: type[Role] | type[FailureCode] | type[GrammarKind]) -> Codec:
    """A member of a string enum, by value."""
    return Codec(lambda value: value.value, lambda value: kind(exactly(str, value)))
