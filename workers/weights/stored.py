"""The bytes of a checkpoint as they stand in its files, or in the copy that a taker keeps: what a source serves.

`server.py` answers out of it, and a taker with a disk of its own reads there what no peer gives. Files and not the
loaded weights, because these are packed, cut and converted for one rank's kernels: a file's bytes are exact for takers
of every width, dtype and device, cost no second copy, and stand in the page cache of a host that has just read them.

Invariant: what is read is what was there at the start; a file that has been changed in place is not read any more.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from penstock.workers.errors import ModelError, PeerError
from penstock.workers.weights.kept import Kept
from penstock.workers.weights.messages import Terms
from penstock.workers.weights.runs import Run


class WeightStore(Protocol):
    """What has a checkpoint's bytes. One thread at a time with each `scratch`."""

    terms: Terms
    config: bytes

    def read(self, file: int, run: Run, scratch: Scratch) -> memoryview | None:
        """The run's bytes in order, valid until `scratch` is used again; None where they are not here (yet)."""
        ...


@dataclass(slots=True)
class Scratch:
    """Memory for reading runs, which grows to the largest."""

    span: bytearray = field(default_factory=bytearray)
    packed: bytearray = field(default_factory=bytearray)

    def read(self, descriptor: int, run: Run) -> memoryview:
        """The run's bytes out of an open file. Raises OSError, also where the file ends before them."""
        if len(self.span) < run.span:
            self.span = bytearray(run.span)
        view = memoryview(self.span)[: run.span]
        have = 0
        while have < len(view):
            count = os.preadv(descriptor, [view[have:]], run.begin + have)
            if not count:
                raise OSError(0, "the file ends early")
            have += count
        if run.count == 1:
            return view
        if len(self.packed) < run.size:
            self.packed = bytearray(run.size)
        rows = np.lib.stride_tricks.as_strided(np.frombuffer(view, np.uint8), (run.count, run.length), (run.stride, 1))
        packed = np.frombuffer(self.packed, np.uint8, run.size).reshape(run.count, run.length)
        packed[:] = rows
        return memoryview(self.packed)[: run.size]


class StoredWeights:
    """The files of a model directory, open; `close` when nobody reads any more."""

    def __init__(self, terms: Terms, config: bytes, paths: Sequence[Path]) -> None:
        """`paths` of the files of `terms`. Raises ModelError for one that is not (or no longer) as stated."""
        self.terms = terms
        self.config = config
        self._descriptors: list[int] = []
        self._stamps: list[tuple[int, int]] = []
        for file, path in zip(terms.files, paths, strict=True):
            try:
                self._descriptors.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
            except OSError as error:
                self.close()
                raise ModelError(f"{path}: cannot be read: {error.strerror}", str(path)) from error
            self._stamps.append(_stamp(self._descriptors[-1]))
            if self._stamps[-1][0] != file.size:
                self.close()
                raise ModelError(f"{path}: changed while it was opened", str(path))

    def read(self, file: int, run: Run, scratch: Scratch) -> memoryview | None:
        """See `WeightStore.read`. Raises PeerError where a file has changed under us or cannot be read."""
        descriptor = self._descriptors[file]
        try:
            if _stamp(descriptor) != self._stamps[file]:
                raise PeerError(f"{self.terms.files[file].name} has been changed since it was loaded")
            return scratch.read(descriptor, run)
        except OSError as error:
            raise PeerError(f"{self.terms.files[file].name}: {error.strerror}") from error

    def close(self) -> None:
        """Safe to call twice."""
        while self._descriptors:
            os.close(self._descriptors.pop())


class KeptWeights:
    """What a taker has got so far, where it keeps a copy."""

    def __init__(self, terms: Terms, config: bytes, kept: Sequence[Kept]) -> None:
        """`kept` of the files of `terms`."""
        self.terms = terms
        self.config = config
        self._kept = tuple(kept)

    def read(self, file: int, run: Run, scratch: Scratch) -> memoryview | None:
        """See `WeightStore.read`."""
        kept = self._kept[file]
        if not kept.has(run):
            return None
        try:
            return scratch.read(kept.descriptor, run)
        except OSError as error:
            raise PeerError(f"the copy of {self.terms.files[file].name}: {error.strerror}") from error


def _stamp(descriptor: int) -> tuple[int, int]:
    found = os.fstat(descriptor)
    return found.st_size, found.st_mtime_ns
