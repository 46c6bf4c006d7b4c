"""Damages valid inputs: by bytes, by the values that a message is made of, by what its lengths claim.

`targets.py` feeds what comes out to a decoder. All chance is the caller's generator, so that a seed repeats a run.
Values of messages are what msgpack knows: numbers, texts, bytes, None and lists of them.
"""

from __future__ import annotations

from random import Random
from typing import Any

import msgpack

NUMBERS = (0, 1, -1, 2, 7, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 1, -(2**63))
_NESTED: Any = 1
for _ in range(60):
    _NESTED = [_NESTED]
ATOMS: tuple[Any, ...] = (
    *NUMBERS,
    *(float("nan"), float("inf"), float("-inf"), -0.0, 1e308, 5e-324, 0.5),
    *(None, True, False, "", "x", "../../etc/passwd", "a,b", ",", "\0", "é" * 40, "x" * 5000),
    *(b"", b"\0", b"x" * 3, b"\xff" * 4, b"\xff" * 8, b"\0" * 16, b"s" * 31, b"s" * 32, b"s" * 33, bytes(4096)),
    *([], [[]], [1, 2, 3], [None] * 33, _NESTED, {}, {1: 2}, {"a": {}}, msgpack.ExtType(5, b"x"), msgpack.Timestamp(1)),
)
# What a msgpack reader may trust at its peril: lengths far beyond what follows, and depth.
CLAIMS = (
    *(b"\xdd\xff\xff\xff\xff", b"\xdc\xff\xff", b"\xc6\xff\xff\xff\xff", b"\xc5\xff\xff", b"\xdb\xff\xff\xff\xff"),
    *(b"\xdf\xff\xff\xff\xff", b"\xde\xff\xff", b"\xc9\xff\xff\xff\xff\x01", b"\xc1", b"\x91" * 2000, b"\x81" * 600),
)


def pack(value: Any) -> bytes:
    """msgpack's bytes of a value; an integer that it cannot hold becomes the largest that it can."""
    data: bytes = msgpack.packb(value, strict_types=False)
    return data


def mutate_values(values: list[Any], rng: Random) -> list[Any]:
    """A copy of one message's fields with one to three of them wrong, missing or in surplus."""
    changed = list(values)
    for _ in range(1 + (rng.random() < 0.3) + (rng.random() < 0.1)):
        place = int(rng.random() * len(changed)) if changed else 0
        what = rng.random()
        if not changed or what < 0.08:
            changed.insert(place, rng.choice(ATOMS))
        elif what < 0.14:
            del changed[place]
        elif what < 0.2:
            other = int(rng.random() * len(changed))
            changed[place], changed[other] = changed[other], changed[place]
        elif what < 0.45:
            changed[place] = rng.choice(ATOMS)
        else:
            changed[place] = _near(changed[place], rng)
    return changed


def _near(value: Any, rng: Random) -> Any:
    """Almost the value: of its kind, but of another length or size."""
    if isinstance(value, list):
        return mutate_values(value, rng)
    if isinstance(value, bytes):
        return mutate_bytes(value, rng)
    if isinstance(value, bool) or value is None:
        return rng.choice(ATOMS)
    if isinstance(value, int):
        near = rng.choice((value + 1, value - 1, -value, value * 2, value ^ 1 << rng.randrange(32)))
        return max(-(2**63), min(2**64 - 1, near))
    if isinstance(value, str):
        return rng.choice((value + "\0", value[:-1], value * 50, "\x7f" + value))
    return rng.choice(ATOMS)


def mutate_bytes(data: bytes, rng: Random) -> bytes:
    """Bits flipped, pieces cut, doubled or put elsewhere, or lengths that claim more than there is."""
    what = rng.random()
    size = len(data)
    at = int(rng.random() * (size + 1))
    if what < 0.35 and size:
        broken = bytearray(data)
        for _ in range(1 + int(rng.random() * 4)):
            broken[int(rng.random() * size)] ^= 1 << int(rng.random() * 8)
        return bytes(broken)
    if what < 0.55:
        return data[:at]
    if what < 0.65:
        return data[:at] + rng.choice(CLAIMS) + data[at:]
    if what < 0.75:
        return data[:at] + rng.choice(CLAIMS)
    if what < 0.85:
        end = min(size, at + 1 + int(rng.random() * 8))
        return data[:end] + data[at:]
    if what < 0.95:
        return data[:at] + rng.randbytes(1 + int(rng.random() * 12)) + data[at + 4 :]
    return rng.randbytes(int(rng.random() * 64))
