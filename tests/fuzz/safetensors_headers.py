"""Safetensors headers, valid and damaged with their structure in mind, and the oracle that judges what was accepted.

The oracle knows the format and not our reader: whatever is accepted must cover the file's data once, without a gap.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from random import Random
from typing import Any

from fuzz.mutation import mutate_bytes

from penstock.workers.model.safetensors_file import SafetensorsFile, parse_header
from penstock.workers.model.safetensors_header import header_bytes

ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
SIZES = (0, 1, -1, 2, 3, 8, 2**31, 2**32, 2**61, 2**62 - 1, 2**62, 2**63, 2**64, 10**40, 1.0, True, None, "4", [4])
DTYPES = ("F8_E4M3", "f32", "", "F32\0", None, 4, ["F32"], {"F32": 1}, "x" * 3000, "Q" * 20)
NAMES = ("", "__metadata__", "../../a", "a\0b", "\ud800", "é" * 200, "x" * 3000, "model.embed.weight")
VALUES = (None, 1, [], {}, "F32", [[], []], {"dtype": "F32"}, 1e400, float("nan"))
DEEP = ("[" * 3000, '{"a":' * 3000, "[" * 3000 + "]" * 3000)
FILE_EVERY = 2048  # inputs that are also written to a file and opened


class HeaderFuzz:
    """Makes inputs (prefix, header, bytes of the file) and feeds them."""

    def __init__(self) -> None:
        self._fed = 0
        self._folder = tempfile.TemporaryDirectory()

    def make(self, rng: Random) -> tuple[bytes, int]:
        """The beginning of a file, with its whole header, and the size that the file has."""
        entries, data_bytes = _valid(rng)
        what = rng.random()
        if what < 0.6:
            for _ in range(1 + (rng.random() < 0.3)):
                _spoil(entries, rng)
        header = json.dumps(entries).encode()
        if 0.55 < what < 0.75:
            header = _spoil_text(header, entries, rng)
        length = len(header)
        if rng.random() < 0.1:
            length = rng.choice((0, 1, length - 1, length + 1, length + data_bytes, 2**31, 2**63, 2**64 - 1, 100 << 20))
        if rng.random() < 0.1:
            data_bytes += rng.choice((-1, 1, 8, 2**40))
        start = max(0, length).to_bytes(8, "little") + header
        if rng.random() < 0.03:
            start = start[: rng.randrange(9)]
        return start, max(0, 8 + len(header) + data_bytes)

    def feed(self, made: tuple[bytes, int]) -> None:
        """Read it as `SafetensorsFile` would; what is accepted must be a partition of the file's data."""
        start, size = made
        self._fed += 1
        if self._fed % FILE_EVERY == 0 and size < 1 << 16:
            self._open_file(start + bytes(max(0, size - len(start))))
        length = header_bytes(start[:8], size, "f")
        entries = parse_header(start[8 : 8 + length], size - 8 - length, "f")
        position = 0
        for entry in sorted(entries.values(), key=lambda one: (one.begin, one.end)):
            count = 1
            for one in entry.shape:
                count *= one
            if entry.begin != position or entry.end - entry.begin != count * entry.dtype.itemsize:
                raise AssertionError(f"an entry is not where its shape says: {entry}")
            position = entry.end
        if position != size - 8 - length:
            raise AssertionError("the tensors do not fill the file")

    def _open_file(self, content: bytes) -> None:
        path = Path(self._folder.name, "x.safetensors")
        path.write_bytes(content)
        file = SafetensorsFile(path)
        for name, entry in file.entries.items():
            if file.read(name).nbytes != entry.end - entry.begin:
                raise AssertionError(f"{name}: read another number of bytes than the header says")
        os.truncate(path, 0)


def _valid(rng: Random) -> tuple[dict[str, Any], int]:
    entries: dict[str, Any] = {}
    position = 0
    for index in range(rng.randrange(5)):
        dtype = rng.choice(tuple(ITEM_BYTES))
        shape = [rng.randrange(5) for _ in range(rng.randrange(4))]
        count = 1
        for size in shape:
            count *= size
        end = position + count * ITEM_BYTES[dtype]
        entries[f"layer.{index}.weight"] = {"dtype": dtype, "shape": shape, "data_offsets": [position, end]}
        position = end
    if rng.random() < 0.3:
        entries["__metadata__"] = {"format": "pt"}
    return entries, position


def _spoil(entries: dict[str, Any], rng: Random) -> None:
    if not entries or rng.random() < 0.1:
        entries[rng.choice(NAMES)] = rng.choice(VALUES)
        return
    name = rng.choice(tuple(entries))
    entry = entries[name]
    what = rng.random()
    if not isinstance(entry, dict) or "shape" not in entry or what < 0.1:
        entries[name] = rng.choice(VALUES)
    elif what < 0.2:
        del entry[rng.choice(tuple(entry))]
        if rng.random() < 0.5:
            entry["extra"] = 1
    elif what < 0.3:
        entry["dtype"] = rng.choice(DTYPES)
    elif what < 0.4:
        entry["shape"] = rng.choice(([1] * 9, [2**61, 8, 2**61], [0, 2**62 - 1], [-1, -1], None, "2", [[1]]))
    elif what < 0.55 and isinstance(entry["shape"], list):
        entry["shape"] = [*entry["shape"], rng.choice(SIZES)]
    elif what < 0.75 and isinstance(entry.get("data_offsets"), list):
        entry["data_offsets"] = [rng.choice(SIZES), *entry["data_offsets"][1:]]
    elif what < 0.9 and isinstance(entry.get("data_offsets"), list):
        entry["data_offsets"] = [*entry["data_offsets"][:1], rng.choice(SIZES)]
    else:
        entries[rng.choice(NAMES)] = dict(entry)  # overlaps


def _spoil_text(header: bytes, entries: dict[str, Any], rng: Random) -> bytes:
    what = rng.random()
    if what < 0.2 and entries:  # a name twice
        name = json.dumps(next(iter(entries))).encode()
        return header[:-1] + b"," + name + b":" + json.dumps(next(iter(entries.values()))).encode() + b"}"
    if what < 0.23:
        return rng.choice(DEEP).encode()
    if what < 0.3:
        return header + b" " * rng.randrange(64) + rng.choice((b"", b"\0", b"{}", b"\xff"))
    if what < 0.35:
        return header.replace(b":", b":1" + b"0" * rng.choice((5, 400, 5000)), 1)
    return mutate_bytes(header, rng)
