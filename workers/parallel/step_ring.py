"""Shared memory through which rank 0 hands large bodies of steps to ranks on its host: written once, read by each.

Used by `step_channel.py`; frames on the connection say where a body lies and what its digest is, so the kernel orders
what is written here before what is read, and a reader sleeps in the connection and not here. Knows no plans.

    cursors   one page: uint64 per reader, 64 bytes apart: everything before this place was read
    ring      `size` bytes; a body never wraps around, place p lies at p modulo size

The memory is an anonymous file (memfd), whose descriptor goes to readers over the connection: it leaves nothing
behind, and its size is sealed. Invariant: bytes in [slowest cursor, head) are not written again.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import time

import numpy as np

from penstock.workers.errors import ConfigError, GroupError, IntegrityError

MAX_READERS = mmap.PAGESIZE // 64
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
_LOOK_S = 0.0002


class RingWriter:
    """Rank 0's end, for `num_readers` readers."""

    def __init__(self, size: int, num_readers: int) -> None:
        """`size` bytes, rounded up to pages. Raises ConfigError where the memory cannot be had."""
        if not 0 < num_readers <= MAX_READERS:
            raise ConfigError(f"{num_readers} ranks on one host; at most {MAX_READERS} can share memory", "group")
        self.size = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        self.descriptor = os.memfd_create("penstock-steps", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.descriptor, mmap.PAGESIZE + self.size)
            fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, _SEALS)
            self._map = mmap.mmap(self.descriptor, mmap.PAGESIZE + self.size)
        except OSError as error:
            os.close(self.descriptor)
            raise ConfigError(f"{self.size >> 10} KiB of shared memory cannot be had: {error}", "group") from error
        self._cursors = np.frombuffer(self._map, np.uint64, MAX_READERS * 8)[: num_readers * 8 : 8]
        self._head = 0

    def write(self, body: bytes, timeout_s: float) -> int:
        """Where the body lies now. Raises GroupError when a reader leaves no room for so long."""
        begin = self._head % self.size
        place = self._head if begin + len(body) <= self.size else self._head + self.size - begin
        end = place + len(body)
        if len(body) > self.size:
            raise IntegrityError(f"a body of {len(body)} bytes for a ring of {self.size}")
        give_up = time.monotonic() + timeout_s
        while self._head > (read := int(self._cursors.min())) and end - read > self.size:
            if time.monotonic() > give_up:
                slowest = int(self._cursors.argmin())
                raise GroupError(f"reader {slowest} of the steps took nothing for {timeout_s:g} s")
            time.sleep(_LOOK_S)
        at = mmap.PAGESIZE + place % self.size
        self._map[at : at + len(body)] = body
        self._head = end
        return place

    def leave_out(self, reader: int) -> None:
        """This reader is gone: nobody waits for it any more, not even a `write` that does already."""
        self._cursors[reader] = np.iinfo(np.uint64).max

    def close(self) -> None:
        """Let go of the memory; readers keep what they have. Safe to call twice."""
        if self.descriptor >= 0:
            self._cursors = np.zeros(1, np.uint64)
            with contextlib.suppress(BufferError):  # a thread that is in it keeps it a moment longer
                self._map.close()
            os.close(self.descriptor)
            self.descriptor = -1


class RingReader:
    """One reader's end."""

    def __init__(self, descriptor: int, reader: int) -> None:
        """Takes the descriptor over. Raises GroupError for what is no ring."""
        try:
            total = os.fstat(descriptor).st_size
            if total <= mmap.PAGESIZE or not 0 <= reader < MAX_READERS:
                raise GroupError(f"reader {reader} of a ring of {total} bytes")
            self._map = mmap.mmap(descriptor, total)
        except OSError as error:
            raise GroupError(f"the ring of steps cannot be mapped: {error}") from error
        finally:
            os.close(descriptor)
        self.size = total - mmap.PAGESIZE
        self._cursors = np.frombuffer(self._map, np.uint64, MAX_READERS * 8)
        self._mine = reader * 8

    def read(self, place: int, size: int) -> bytearray:
        """A copy of `size` bytes there; the writer may use them again. Raises IntegrityError."""
        if place < int(self._cursors[self._mine]) or place % self.size + size > self.size:
            raise IntegrityError(f"{size} bytes at {place} are not in the ring")
        at = mmap.PAGESIZE + place % self.size
        body = bytearray(size)
        body[:] = memoryview(self._map)[at : at + size]
        self._cursors[self._mine] = place + size
        return body

    def close(self) -> None:
        """Let go of the memory."""
        self._cursors = np.zeros(MAX_READERS * 8, np.uint64)
        with contextlib.suppress(BufferError):
            self._map.close()
