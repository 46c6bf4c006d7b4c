"""The header of a safetensors file, checked: which tensors there are, and where. Needs no torch.

Used by `safetensors_file.py` for checkpoints and by `workers/lora/` for adapters. Nothing in a header is trusted:
length, JSON, names, dtypes, shapes and offsets are checked before anything is allocated for them. Format: 8 bytes
little-endian header length, that many bytes of JSON, then the tensors' bytes
(https://github.com/huggingface/safetensors, "Format").
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

from penstock.workers.errors import ModelError

MAX_HEADER_BYTES = 100 << 20
MAX_TENSORS = 1 << 20
MAX_DIMENSIONS = 8
MAX_STRIDE = 1 << 62
# The format's name of a dtype -> bytes of one number.
DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


@dataclass(frozen=True, slots=True)
class HeaderEntry:
    """Where one tensor lies: bytes `[begin, end)` counted from the end of the header; `dtype` as the format says it."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


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


def read_header(header: bytes, data_bytes: int, path: str) -> dict[str, HeaderEntry]:
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


def _parse_entry(name: str, value: Any, data_bytes: int, path: str) -> HeaderEntry:
    def fail(message: str) -> ModelError:
        return ModelError(f"{path}: {name:.200}: {message:.300}", path)

    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise fail("expected exactly dtype, shape and data_offsets")
    dtype = value["dtype"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise fail(f"dtype {dtype!r} is not supported")
    shape, offsets = value["shape"], value["data_offsets"]
    if not _sizes(shape) or len(shape) > MAX_DIMENSIONS:
        raise fail(f"shape must be a list of at most {MAX_DIMENSIONS} sizes")
    if not _sizes(offsets) or len(offsets) != 2 or not offsets[0] <= offsets[1] <= data_bytes:
        raise fail(f"data_offsets {offsets!r} are not inside the file's {data_bytes} data bytes")
    if math.prod(max(1, size) for size in shape) >= MAX_STRIDE:
        raise fail("shape is beyond what strides can count, empty as it may be")
    expected = math.prod(shape) * DTYPE_BYTES[dtype]
    if offsets[1] - offsets[0] != expected:
        raise fail(f"shape and dtype make {expected} bytes, data_offsets {offsets[1] - offsets[0]}")
    return HeaderEntry(dtype, tuple(shape), offsets[0], offsets[1])


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 1 << 62 for size in value)
