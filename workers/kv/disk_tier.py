"""KV blocks in files of one directory, by prefix digest: what host memory holds and may have to let go.

Used by `tiers.py`. The directory is this worker's alone while it lives (a lock on a file in it), and outlives it: the
next worker of the same model that comes to the same place finds its blocks again. Knows bytes and digests only.

A directory is named after the blocks' layout, which stands for the model's revision too. Who opens one removes those
of other layouts that no running worker has locked, so that models which are no longer served take no room for ever.

Invariants: the files hold at most `disk_bytes`, those used last; a failing disk never raises here: a read is a miss, a
write is dropped, both are counted, and after a failed write none is tried for `_PAUSE_S`. `write` and `open` are called
on one thread, `read` on one other, `in` on any.
"""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import logging
import os
import shutil
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path

from penstock.workers.errors import WireError
from penstock.workers.kv.segment_file import (
    SUFFIX,
    UNFINISHED,
    Segment,
    read_block,
    read_head,
    write_segment,
)

log = logging.getLogger(__name__)

_PAUSE_S = 60.0
_SCAN_S = 5.0  # longest look at what an earlier worker left
_MOST_DIRECTORIES = 64  # of workers of one model on one host
_LOCK = "lock"
_PREFIX = "penstock-kv-"


class DiskTier:
    """Blocks of one layout below `root`; holds nothing, and keeps nothing, until `open` has found a directory."""

    def __init__(
        self,
        root: Path,
        compatibility: str,
        block_bytes: int,
        disk_bytes: int,
        changed: Callable[[bytes], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`compatibility` of the layout. `changed` hears of every digest that came or went."""
        self._root = root
        self._layout = hashlib.sha256(compatibility.encode()).digest()
        self._block_bytes = block_bytes
        self._disk_bytes = disk_bytes
        self._changed = changed
        self._clock = clock
        self._guard = threading.Lock()  # of the next three
        self._segments: OrderedDict[Path, Segment] = OrderedDict()  # least recently used first
        self._places: dict[bytes, tuple[Segment, int]] = {}
        self._size = 0
        self._directory: Path | None = None
        self._lock = -1
        self._serial = itertools.count()
        self._paused_until = 0.0
        self._complained = False
        self.errors = self.evictions = self.written = 0

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._places

    def __len__(self) -> int:
        return len(self._places)

    def open(self) -> None:
        """Take a directory, and what an earlier worker left in it, newest first and only for a few seconds."""
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            self._remove_foreign()
            self._directory = self._take_directory()
            self._take_over(self._directory)
        except OSError as error:
            self._failed(error)

    def write(self, blocks: Sequence[tuple[bytes, bytes]]) -> bool:
        """Keep `(digest, bytes)` in one new segment; older ones give way. False: nothing was kept."""
        directory = self._directory
        if directory is None or self._clock() < self._paused_until:
            return False
        size = sum(len(data) for _, data in blocks)
        self._make_room(size)
        try:
            segment = write_segment(directory / f"{next(self._serial):016x}{SUFFIX}", self._layout, blocks)
        except OSError as error:
            self._failed(error)
            return False
        self._enter(segment)
        self._complained = False
        self.written += size
        self._make_room(0)
        return True

    def read(self, digest: bytes) -> bytes | None:
        """The block's bytes, as they were written; None, and forgotten with its file, where the disk has them not."""
        with self._guard:
            found = self._places.get(digest)
            if found is None:
                return None
            segment, place = found
            self._segments.move_to_end(segment.path)
        try:
            return read_block(segment, place)
        except (OSError, WireError) as error:
            with self._guard:
                known = segment.path in self._segments
            if known:  # else it gave way meanwhile
                self.errors += 1
                self._drop(segment)
                self._complain(error)
            return None

    def close(self) -> None:
        """Let another worker have the directory. Safe to call twice."""
        self._directory = None
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    # --- the directory --------------------------------------------------------------------------------------------

    def _take_directory(self) -> Path:
        """The first one of this layout that no running worker has; made where there is none. Raises OSError."""
        for number in range(_MOST_DIRECTORIES):
            directory = self._root / f"{_PREFIX}{self._layout.hex()[:16]}-{number}"
            directory.mkdir(exist_ok=True)
            lock = _locked(directory)
            if lock is not None:
                self._lock = lock
                return directory
        raise OSError(f"all {_MOST_DIRECTORIES} directories of this model are in use")

    def _remove_foreign(self) -> None:
        ours = f"{_PREFIX}{self._layout.hex()[:16]}-"
        for directory in self._root.glob(f"{_PREFIX}*-*"):
            lock = None if directory.name.startswith(ours) else _locked(directory)
            if lock is not None:
                shutil.rmtree(directory, ignore_errors=True)
                os.close(lock)

    def _take_over(self, directory: Path) -> None:
        """Enter the segments of an earlier worker that are whole; what is not, or is too much, goes."""
        give_up = self._clock() + _SCAN_S
        for unfinished in directory.glob(f"*{UNFINISHED}"):
            unfinished.unlink(missing_ok=True)
        paths = sorted(directory.glob(f"*{SUFFIX}"), reverse=True)
        found: list[Segment] = []
        size = 0
        for path in paths:
            try:
                segment = read_head(path, self._layout, self._block_bytes) if self._clock() < give_up else None
            except (OSError, WireError):
                segment = None
            if segment is None or size + segment.size > self._disk_bytes:
                path.unlink(missing_ok=True)
                continue
            size += segment.size
            found.append(segment)
        for segment in reversed(found):
            self._enter(segment)
        self._serial = itertools.count(int(paths[0].stem, 16) + 1 if paths else 0)

    # --- the index ------------------------------------------------------------------------------------------------

    def _enter(self, segment: Segment) -> None:
        with self._guard:
            self._segments[segment.path] = segment
            self._size += segment.size
            for place, digest in enumerate(segment.digests):
                self._places[digest] = (segment, place)
        self._changed(b"".join(segment.digests))

    def _make_room(self, size: int) -> None:
        """Let segments go, least recently used first, until `size` more bytes are within the bound."""
        while True:
            with self._guard:
                if not self._segments or self._size + size <= self._disk_bytes:
                    return
                segment = next(iter(self._segments.values()))
            self.evictions += self._drop(segment)

    def _drop(self, segment: Segment) -> int:
        """Forget a segment and remove its file; how many blocks went."""
        with self._guard:
            if self._segments.pop(segment.path, None) is None:
                return 0
            self._size -= segment.size
            gone = [digest for digest in segment.digests if self._places.get(digest, (None,))[0] is segment]
            for digest in gone:
                del self._places[digest]
        try:
            segment.path.unlink(missing_ok=True)
        except OSError as error:
            self._failed(error)
        self._changed(b"".join(gone))
        return len(gone)

    def _failed(self, error: OSError) -> None:
        self.errors += 1
        self._paused_until = self._clock() + _PAUSE_S
        self._complain(error)

    def _complain(self, error: Exception) -> None:
        """Once, until a write succeeds again."""
        if not self._complained:
            self._complained = True
            log.warning("the KV disk tier fails, blocks are computed again instead: %s", error)


def _locked(directory: Path) -> int | None:
    """The descriptor that holds the lock of a directory; None where another process has it, or it cannot be had."""
    try:
        lock = os.open(directory / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        return None
    return lock
