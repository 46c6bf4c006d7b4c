"""Our own reader of one safetensors file: a checked header, and tensors read from a memory map, only the bytes needed.

Used by `checkpoint.py`; `parse_header` also for files that peers hold (`workers/weights/`). Nothing in the file is
trusted: length, JSON, names, dtypes, shapes and offsets are checked before anything is mapped, so a hostile header
costs an error and no memory. Format: 8 bytes little-endian header length, that many bytes of JSON, then the tensors'
bytes (https://github.com/huggingface/safetensors, "Format").
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from penstock.workers.errors import ModelError

MAX_HEADER_BYTES = 100 << 20
MAX_TENSORS = 1 << 20
MAX_DIMENSIONS = 8
MAX_STRIDE = 1 << 62
SAMPLE_BYTES = 4096
_AROUND = max(1 << 16, mmap.PAGESIZE)

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies: bytes `[begin, end)` counted from the end of the header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


class SafetensorsFile:
    """One open file. `entries` maps names to places; `digest` is over the header and a sample of every tensor.

    Tensors returned by `read` are views of the map and keep it alive; copy what must stay. Nobody writes to them.
    `bytes_read` counts what went through `arriving`.
    """

    def __init__(self, path: Path) -> None:
        """Open and check. Raises ModelError naming the file, and the tensor where one is at fault."""
        self.path = path
        try:
            with path.open("rb") as file:
                self.size = os.fstat(file.fileno()).st_size
                header = file.read(header_bytes(file.read(8), self.size, str(path)))
                self.data_offset = 8 + len(header)
                self.entries: Mapping[str, TensorEntry] = parse_header(header, self.size - self.data_offset, str(path))
                # A private map: torch wants writable memory, and nobody's writes may reach the file.
                self._map = mmap.mmap(file.fileno(), self.size, access=mmap.ACCESS_COPY)
        except OSError as error:
            raise ModelError(f"{path}: cannot be read: {error.strerror}", str(path)) from error
        self.bytes_read = 0
        self.header_digest = hashlib.sha256(header).digest()
        self.digest = self._sample(header)

    def _sample(self, header: bytes) -> bytes:
        """SHA-256 that tells checkpoints of equal shapes apart without reading them whole."""
        digest = hashlib.sha256(header)
        for entry in self.entries.values():
            begin = self.data_offset + entry.begin
            digest.update(self._map[begin : begin + min(SAMPLE_BYTES, entry.end - entry.begin)])
            self._drop(begin, begin + SAMPLE_BYTES)
        return digest.digest()

    def read(self, name: str) -> Tensor:
        """The tensor, of its stored dtype and shape. Raises KeyError for unknown names."""
        entry = self.entries[name]
        count = math.prod(entry.shape)
        if count == 0:
            return torch.empty(entry.shape, dtype=entry.dtype)
        flat = torch.frombuffer(self._map, dtype=entry.dtype, count=count, offset=self.data_offset + entry.begin)
        return flat.view(entry.shape)

    def arriving(self, name: str, pieces: Sequence[Tensor]) -> Iterator[Tensor]:
        """`pieces`, views of the named tensor, one by one; what reading one took is given back before the next."""
        for piece in pieces:
            yield piece
            self.bytes_read += piece.nbytes
            self.release(name)

    def release(self, name: str) -> None:
        """Give back the memory that reading this tensor took; views stay valid, and reading again reads the file."""
        entry = self.entries[name]
        self._drop(self.data_offset + entry.begin, self.data_offset + entry.end)

    def _drop(self, begin: int, end: int) -> None:
        """Unmap these bytes' pages and those that the system maps around one that is touched."""
        begin = max(0, begin // _AROUND - 1) * _AROUND
        end = min(len(self._map), end + _AROUND)
        self._map.madvise(mmap.MADV_DONTNEED, begin, end - begin)


def header_bytes(prefix: bytes, size: int, path: str) -> int:
    """How long the header is behind `prefix`, the first 8 bytes of a file of `size`. Raises ModelError."""
    if len(prefix) < 8:
        raise ModelError(f"{path}: shorter than a safetensors header", path)
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER_BYTES:
        raise ModelError(f"{path}: header length {length} is above {MAX_HEADER_BYTES} bytes", path)
    if 8 + length > size:
        raise ModelError(f"{path}: header length {length} goes past the end of the file ({size} bytes)", path)
    return length


def parse_header(header: bytes, data_bytes: int, path: str) -> dict[str, TensorEntry]:
    """The tensors of a header, which must fill `data_bytes` without a gap. Raises ModelError naming the tensor."""
    try:
        raw = json.loads(header, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: header: {error!s:.200}", path) from error
    if not isinstance(raw, dict):
        raise ModelError(f"{path}: header is not an object", path)
    raw.pop("__metadata__", None)
    if len(raw) > MAX_TENSORS:
        raise ModelError(f"{path}: {len(raw)} tensors are above {MAX_TENSORS}", path)
    entries = {name: _parse_entry(name, value, data_bytes, path) for name, value in raw.items()}
    position = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != position:
            what = "overlaps the tensor before it" if entry.begin < position else "leaves a gap before it"
            raise ModelError(f"{path}: {name:.200}: {what}", path)
        position = entry.end
    if position != data_bytes:
        raise ModelError(f"{path}: tensors end at byte {position} of {data_bytes}; the file is cut or padded", path)
    return entries


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("the same key stands twice")
    return result


def _parse_entry(name: str, value: Any, data_bytes: int, path: str) -> TensorEntry:
    def fail(message: str) -> ModelError:
        return ModelError(f"{path}: {name:.200}: {message:.300}", path)

    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise fail("expected exactly dtype, shape and data_offsets")
    dtype = _DTYPES.get(value["dtype"]) if isinstance(value["dtype"], str) else None
    if dtype is None:
        raise fail(f"dtype {value['dtype']!r} is not supported")
    shape, offsets = value["shape"], value["data_offsets"]
    if not _sizes(shape) or len(shape) > MAX_DIMENSIONS:
        raise fail(f"shape must be a list of at most {MAX_DIMENSIONS} sizes")
    if not _sizes(offsets) or len(offsets) != 2 or not offsets[0] <= offsets[1] <= data_bytes:
        raise fail(f"data_offsets {offsets!r} are not inside the file's {data_bytes} data bytes")
    if math.prod(max(1, size) for size in shape) >= MAX_STRIDE:
        raise fail("shape is beyond what strides can count, empty as it may be")
    expected = math.prod(shape) * dtype.itemsize
    if offsets[1] - offsets[0] != expected:
        raise fail(f"shape and dtype make {expected} bytes, data_offsets {offsets[1] - offsets[0]}")
    return TensorEntry(dtype, tuple(shape), offsets[0], offsets[1])


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 1 << 62 for size in value)
