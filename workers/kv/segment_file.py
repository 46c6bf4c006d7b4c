"""The file format of the disk tier: some KV blocks with their digests, each checked by itself.

Written and read by `disk_tier.py`. A segment is written to a name of its own and renamed when whole, so a reader sees
all of it or nothing; should the disk lie, the checksums do not.

    magic 8s | layout 32s | block_bytes u64 | count u64 | count x (digest 32s, checksum u64) | checksum u64 | blocks

The layout stands for model, revision, codec and shape, and every checksum of a block is taken with its digest: a file
of another model, and a block that lies where another should, are never read as something else.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from xxhash import xxh3_64_intdigest

from penstock.workers import fault_points
from penstock.workers.errors import WireError
from penstock.workers.fault_points import Point
from penstock.workers.kv.host_tier import checksum_of
from penstock.workers.protocol import DIGEST_BYTES

SUFFIX = ".kv"
UNFINISHED = ".part"
_MAGIC = b"PSTKSEG1"
_HEAD = struct.Struct("<8s32sQQ")
_ENTRY = struct.Struct(f"<{DIGEST_BYTES}sQ")
_CHECKSUM = struct.Struct("<Q")
MAX_BLOCKS = 4096  # of one segment; a header that says more is damaged


@dataclass(frozen=True, slots=True)
class Segment:
    """What one file holds; `checksums` and `digests` by place."""

    path: Path
    digests: tuple[bytes, ...]
    checksums: tuple[int, ...]
    block_bytes: int
    size: int  # bytes of the whole file


def write_segment(path: Path, layout: bytes, blocks: Sequence[tuple[bytes, bytes]]) -> Segment:
    """Write `(digest, bytes)` of blocks of one size. Raises OSError; then nothing is left of it."""
    digests = tuple(digest for digest, _ in blocks)
    checksums = tuple(checksum_of(data, digest) for digest, data in blocks)
    block_bytes = len(blocks[0][1])
    head = _HEAD.pack(_MAGIC, layout, block_bytes, len(blocks))
    head += b"".join(_ENTRY.pack(*entry) for entry in zip(digests, checksums, strict=True))
    head += _CHECKSUM.pack(xxh3_64_intdigest(head))
    unfinished = path.with_suffix(UNFINISHED)
    try:
        with unfinished.open("wb", buffering=0) as file:
            for part in (head, *(data for _, data in blocks)):
                _write_all(file.fileno(), part)
        unfinished.replace(path)
    except OSError:
        unfinished.unlink(missing_ok=True)
        raise
    return Segment(path, digests, checksums, block_bytes, len(head) + block_bytes * len(blocks))


def read_head(path: Path, layout: bytes, block_bytes: int) -> Segment:
    """What a file says it holds. Raises OSError, and WireError for all that is not a whole segment of this layout."""
    with path.open("rb") as file:
        start = file.read(_HEAD.size)
        if len(start) != _HEAD.size:
            raise WireError(f"{path} is no KV segment: too short")
        magic, found, size, count = _HEAD.unpack(start)
        if magic != _MAGIC or found != layout or size != block_bytes or not 0 < count <= MAX_BLOCKS:
            raise WireError(f"{path} is no KV segment of this model")
        rest = file.read(count * _ENTRY.size + _CHECKSUM.size)
        whole = os.fstat(file.fileno()).st_size
    entries = rest[: -_CHECKSUM.size]
    if len(entries) != count * _ENTRY.size or whole != len(start) + len(rest) + count * size:
        raise WireError(f"{path} is no KV segment: cut short")
    if _CHECKSUM.unpack(rest[-_CHECKSUM.size :])[0] != xxh3_64_intdigest(start + entries):
        raise WireError(f"{path} is no KV segment: its head is damaged")
    digests, checksums = zip(*_ENTRY.iter_unpack(entries), strict=True)
    return Segment(path, digests, checksums, size, whole)


def read_block(segment: Segment, place: int) -> bytes:
    """The bytes of one block. Raises OSError, and WireError where they are not those that were written."""
    first = segment.size - segment.block_bytes * (len(segment.digests) - place)
    descriptor = os.open(segment.path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        data = os.pread(descriptor, segment.block_bytes, first)
    finally:
        os.close(descriptor)
    if len(data) != segment.block_bytes or checksum_of(data, segment.digests[place]) != segment.checksums[place]:
        raise WireError(f"block {place} of {segment.path} is damaged")
    return data


def _write_all(descriptor: int, data: bytes) -> None:
    if fault_points.plan is not None:
        fault_points.plan.reach(Point.DISK_WRITE, "")
    left = memoryview(data)
    while len(left):
        left = left[os.write(descriptor, left) :]
