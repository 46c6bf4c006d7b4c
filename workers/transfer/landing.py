"""Where the bytes of offered blocks go: views for TCP, a checked copy out of the peer's segment for shared memory.

Used by `receiver.py`. Knows blocks and generations; what a digest says and a session's fate are the receiver's.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from penstock.workers.errors import WireError
from penstock.workers.kv.sliced_pool import HeadSlice, SlicedPool
from penstock.workers.transfer.endpoint import Endpoint
from penstock.workers.transfer.incoming import Delivery
from penstock.workers.transfer.messages import Hello, Offer
from penstock.workers.transfer.port import DirectPeerPool, HostBlocks, HostPeerPool

Entry = tuple[int, int, int, int, int, int]  # one row of OFFER_DTYPE
Verify = Callable[[Entry, memoryview], bool]  # the block's bytes are those that the entry says
_NOTHING = memoryview(b"")
_SEGMENT_PATH = re.compile(r"/proc/[1-9][0-9]*/fd/[0-9]+")
_log = logging.getLogger(__name__)


class BlockLanding:
    """Where the blocks of one offer go. `host`: memory for the wanted ones, None where no bytes are wanted at all.

    `delivery`: whose blocks they are; None where nobody here expects them. `targets`: the block for each entry, None
    for one that is here already.
    """

    __slots__ = ("_scratch", "delivery", "host", "intact", "offer", "rows", "targets", "wanted")

    def __init__(
        self,
        offer: Offer,
        delivery: Delivery | None,
        targets: Sequence[int | None] = (),
        host: HostBlocks | None = None,
        scratch: memoryview = _NOTHING,
    ) -> None:
        self.offer = offer
        self.delivery = delivery
        self.targets = targets
        self.wanted = [place for place, target in enumerate(targets) if target is not None]  # places of the offer
        self.rows: list[Entry] = offer.entries[self.wanted].tolist()  # of the wanted entries
        self.host = host
        self.intact: list[bool] = []  # per wanted entry, once its bytes are there: they are the offered ones
        self._scratch = scratch

    @property
    def open(self) -> bool:
        """The session lives: its blocks may be written."""
        return self.delivery is not None and self.delivery.open

    def views(self) -> list[memoryview]:
        """Writable views for the offer's blocks in order; of a block that is here already, a scratch block."""
        if self.host is None:
            return [self._scratch] * len(self.targets)
        if len(self.wanted) == len(self.targets):
            return self.host.runs
        blocks = iter(self.host.blocks)
        return [self._scratch if target is None else next(blocks) for target in self.targets]

    def verify_all(self, verify: Verify) -> None:
        """Fill `intact`, all bytes being there."""
        if self.host is not None:
            self.intact = [verify(entry, block) for entry, block in zip(self.rows, self.host.blocks, strict=True)]

    def copy_directly(self, peer: DirectPeerPool, sources: Sequence[int]) -> None:
        """Let the device copy the wanted blocks into the pool. No digest covers what the host never sees."""
        peer.copy(sources, [target for target in self.targets if target is not None])
        self.release()
        self.host = None
        self.intact = [True] * len(self.rows)

    def release(self) -> None:
        """Nothing is written any more."""
        if self.host is not None:
            self.host.release()


class SlicedPeer:
    """`HostPeerPool` of which a connection carries some heads only."""

    def __init__(self, peer: HostPeerPool, part: HeadSlice) -> None:
        self._peer = peer
        self._pool = peer.slice_pool(part)
        self.num_blocks = self._pool.num_blocks
        self.block_bytes = self._pool.block_bytes

    @property
    def generations(self) -> NDArray[np.uint64]:
        """The owner's, as they are now."""
        return self._pool.generations

    def read(self, blocks: Sequence[int]) -> HostBlocks:
        """The slices of these blocks, as they are now."""
        return self._pool.read(blocks)

    def slice_pool(self, part: HeadSlice) -> SlicedPool:
        """Of the whole blocks."""
        return self._peer.slice_pool(part)

    def close(self) -> None:
        """Let go of the peer's pool."""
        self._peer.close()


def attach_segment(endpoint: Endpoint, hello: Hello) -> HostPeerPool | DirectPeerPool | None:
    """The peer's storage as this connection carries it, read-only; None where it offers none or we cannot see it.

    Raises WireError when what is there is not what the peer says.
    """
    if endpoint.settings.transport == "tcp" or hello.host_id != endpoint.host_id:
        return None
    if not _SEGMENT_PATH.fullmatch(hello.segment):
        return None
    try:
        segment = endpoint.storage.attach(hello.segment)
    except (OSError, WireError) as error:
        _log.warning("cannot attach the KV storage of %s: %s", hello.worker_id, error)
        return None
    if (segment.num_blocks, segment.block_bytes) != (hello.num_blocks, hello.block_bytes):
        segment.close()
        raise WireError("transfer: the peer's KV storage is not what it says")
    if hello.sent == hello.held == endpoint.share.heads:
        return segment
    if isinstance(segment, DirectPeerPool):  # devices copy whole blocks only
        segment.close()
        return None
    if hello.sent == hello.held:
        return segment
    first = hello.sent.first - hello.held.first
    return SlicedPeer(segment, HeadSlice(endpoint.pieces, hello.held.count, first, hello.sent.count))


def copy_blocks(landing: BlockLanding, segment: HostPeerPool | DirectPeerPool, verify: Verify) -> bool:
    """Copy and verify the wanted blocks. False: the sender has meanwhile reused one, so the copies are worth nothing.

    The owner raises a block's generation before it writes new content, so equal numbers before and after the copy
    mean that the content was the offered one all the while (the loads and stores stay in order on x86; elsewhere the
    digest has the last word). Each block is verified right after its copy, while it is still in the cache; without
    digests whole runs of blocks are copied at once.
    """
    if landing.host is None:
        return True
    entries = landing.offer.entries[landing.wanted]
    numbers, offered = entries["source_block"], entries["source_generation"]
    if not np.array_equal(segment.generations[numbers], offered):
        return False
    if isinstance(segment, DirectPeerPool):
        landing.copy_directly(segment, numbers.tolist())
        return bool(np.array_equal(segment.generations[numbers], offered))
    source, target = segment.read(numbers.tolist()), landing.host
    if entries["checked"].any():
        for entry, ours, theirs in zip(landing.rows, target.blocks, source.blocks, strict=True):
            _copy(ours, theirs)
            landing.intact.append(verify(entry, ours))
    else:
        copy_runs(target.runs, source.runs)
        landing.verify_all(verify)
    return bool(np.array_equal(segment.generations[numbers], offered))


def copy_runs(targets: Sequence[memoryview], sources: Sequence[memoryview]) -> None:
    """Copy the sources' bytes, one after the other, to the targets, which have as many in pieces of other sizes."""
    places = iter(targets)
    target = next(places, _NOTHING)
    for run in sources:
        source = run
        while source:
            if not target:
                target = next(places)
            size = min(len(source), len(target))
            _copy(target[:size], source[:size])
            source, target = source[size:], target[size:]


def _copy(target: memoryview, source: memoryview) -> None:
    # Not a slice assignment, which would hold the interpreter's lock all the while.
    np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(source, np.uint8))
