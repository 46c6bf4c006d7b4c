"""One safetensors file whose bytes come from peers or a disk while they are read: it looks like a mapped file.

`supply.py` makes one for each file of a checkpoint; `weight_reader.py` reads it as it reads a file of our own. Behind
it is address space as long as the file, of which only the piece that is being read has memory, so that a load takes no
more than from a file; or the copy that is kept (`kept.py`), mapped. Knows tensors and bytes, not where these come from.

Invariant: a view out of `arriving` holds verified bytes; what follows it has not been touched.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from penstock.workers.model.safetensors_file import TensorEntry
from penstock.workers.weights.intake import Intake
from penstock.workers.weights.kept import Kept
from penstock.workers.weights.messages import ServedFile
from penstock.workers.weights.runs import Run, runs_of

_NO_RESERVE = 0x4000  # Linux's MAP_NORESERVE: address space, not a promise of memory


class ArrivingFile:
    """See `WeightFile`; `bytes_read` stays 0, as the intake knows what came from where."""

    def __init__(
        self, place: int, file: ServedFile, entries: Mapping[str, TensorEntry], intake: Intake, kept: Kept | None
    ) -> None:
        """File number `place` of the checkpoint that `intake` brings; `entries` fill it up to its end."""
        self.path = Path(file.name)
        self.size = file.size
        self.entries = entries
        self.data_offset = file.size - max((entry.end for entry in entries.values()), default=0)
        self.header_digest = file.header_digest
        self.digest = file.digest
        self.bytes_read = 0
        self._place = place
        self._intake = intake
        self._kept = kept
        if kept is None:
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE
            self._map = mmap.mmap(-1, self.size, flags=flags)
        else:
            self._map = mmap.mmap(kept.descriptor, self.size, flags=mmap.MAP_SHARED)
        self._bytes = np.frombuffer(self._map, np.uint8)

    def read(self, name: str) -> Tensor:
        """The tensor, of its stored dtype and shape, whose numbers come through `arriving`. Raises KeyError."""
        entry = self.entries[name]
        if math.prod(entry.shape) == 0:
            return torch.empty(entry.shape, dtype=entry.dtype)
        flat = torch.frombuffer(
            self._map, dtype=entry.dtype, count=math.prod(entry.shape), offset=self.data_offset + entry.begin
        )
        return flat.view(entry.shape)

    def arriving(self, name: str, pieces: Sequence[Tensor]) -> Iterator[Tensor]:
        """`pieces`, views of the named tensor in order, one by one. Raises ModelError where bytes cannot be had."""
        runs = ((self._place, run) for piece in pieces for run in self._runs(piece))
        stream = self._intake.stream(runs)
        try:
            for piece in pieces:
                begin, end = self.size, 0
                for run in self._runs(piece):
                    self._land(run, next(stream))
                    begin, end = min(begin, run.begin), max(end, run.end)
                yield piece
                self._drop(begin, end)
        finally:
            stream.close()

    def _runs(self, piece: Tensor) -> Iterator[Run]:
        itemsize = piece.element_size()
        begin = piece.data_ptr() - self._bytes.ctypes.data if piece.numel() else 0
        return runs_of(begin, piece.shape, [stride * itemsize for stride in piece.stride()], itemsize)

    def _land(self, run: Run, data: memoryview) -> None:
        if self._kept is not None:
            self._kept.write(run, data)
            return
        # numpy: what torch copies by several threads waits for the slowest of them, half a megabyte at a time.
        span = self._bytes[run.begin : run.end]
        rows = np.lib.stride_tricks.as_strided(span, (run.count, run.length), (run.stride, 1))
        rows[:] = np.frombuffer(data, np.uint8).reshape(run.count, run.length)

    def _drop(self, begin: int, end: int) -> None:
        """Give back the memory of a piece that has been read, and of what lies between its runs."""
        if begin < end:
            first = begin // mmap.PAGESIZE * mmap.PAGESIZE
            self._map.madvise(mmap.MADV_DONTNEED, first, end - first)
