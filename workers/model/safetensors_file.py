"""Our own reader of one safetensors file: a checked header, and tensors read from a memory map, only the bytes needed.

Used by `checkpoint.py`; `parse_header` also for files that peers hold (`workers/weights/`). The header is checked
(`safetensors_header.py`) before anything is mapped, so a hostile one costs an error and no memory.
"""

from __future__ import annotations

import hashlib
import math
import mmap
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from penstock.workers.errors import ModelError
from penstock.workers.model.safetensors_header import header_bytes, read_header

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


def parse_header(header: bytes, data_bytes: int, path: str) -> dict[str, TensorEntry]:
    """The tensors of a header, which must fill `data_bytes` without a gap. Raises ModelError naming the tensor."""
    return {
        name: TensorEntry(_DTYPES[entry.dtype], entry.shape, entry.begin, entry.end)
        for name, entry in read_header(header, data_bytes, path).items()
    }
