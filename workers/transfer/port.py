"""The faces of KV transfer: what the engine may ask and the events it gets back, and what a pool of blocks must offer.

`BlockSource` and `BlockSink` are all that the transfer thread asks of a pool: bytes of blocks in host memory, to read
or to fill. `kv/storage.py` hands out its own memory; a pool on a device does it through `staging.py`.

The engine thread calls these methods; none blocks, and a transfer thread does the work. Implemented by `engine.py` of
this folder over shared memory, TCP and NCCL, and by a fake in tests that reorders, repeats, delays and drops.

Invariants the engine relies on:
- after `Arrived`, `IncomingFailed` or `IncomingClosed` nobody writes the session's blocks any more;
- after `OutgoingDone` or `OutgoingFailed` nobody reads the session's source blocks for it any more;
- every `expect` ends in exactly one of `Arrived`, `IncomingFailed`, `IncomingClosed`, every `start` in exactly one
  of `OutgoingDone`, `OutgoingFailed`; unknown ids in the other calls are ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from penstock.workers.kv.sliced_pool import HeadSlice, SlicedPool
from penstock.workers.protocol import Grant, Tokens
from penstock.workers.totals import TransferCause


@dataclass(frozen=True, slots=True)
class Tail:
    """What the sender knows at the end besides the KV: of a prefill the first generated token(s), in order.

    `fragments`: of a sequence that ran at the sender, how many leading blocks of the grant it fills; its `tokens` have
    their KV in them, all but the last. None: of a prefill, which fills all.
    """

    tokens: Tokens
    fragments: int | None = None


@dataclass(frozen=True, slots=True)
class Incoming:
    """A session this worker granted: fragment i lands in `blocks[i]`, if its generation is still `generations[i]`."""

    session_id: bytes
    epoch: int
    blocks: Tokens
    generations: tuple[int, ...]
    lease_s: float
    bank: int = 0  # in which all of `blocks` lie (`kv/banks.py`)


@dataclass(frozen=True, slots=True)
class Arrived:
    """All fragments and the tail are here and verified."""

    session_id: bytes
    tail: Tail


@dataclass(frozen=True, slots=True)
class IncomingFailed:
    """The session ended before it was whole; `reason` is one short sentence for logs, `cause` is for counters."""

    session_id: bytes
    reason: str
    cause: TransferCause = field(default=TransferCause.REFUSED, compare=False)


@dataclass(frozen=True, slots=True)
class IncomingClosed:
    """Answer to `forget`: no thread can write the session's blocks any more."""

    session_id: bytes


@dataclass(frozen=True, slots=True)
class OutgoingDone:
    """The peer has verified and acknowledged everything; source blocks may be reused."""

    session_id: bytes


@dataclass(frozen=True, slots=True)
class OutgoingFailed:
    """The peer refused, vanished, or let the lease end; source blocks may be reused."""

    session_id: bytes
    reason: str
    cause: TransferCause = field(default=TransferCause.REFUSED, compare=False)


@dataclass(frozen=True, slots=True)
class OutgoingCaughtUp:
    """Answer to `probe`, and no end of the session: the peer has all that was offered before."""

    session_id: bytes


TransferEvent = Arrived | IncomingFailed | IncomingClosed | OutgoingDone | OutgoingFailed | OutgoingCaughtUp


class TransferPort(Protocol):
    """What the engine asks of the transfer side. All calls are thread-safe and return at once."""

    @property
    def address(self) -> str:
        """host:port on which peers reach this worker."""
        ...

    def expect(self, session: Incoming) -> None:
        """Accept fragments for a session just granted; its lease starts now, on this worker's clock."""
        ...

    def forget(self, session_id: bytes) -> None:
        """Stop accepting; answered by `IncomingClosed` unless another final event was already on its way."""
        ...

    def start(self, grant: Grant, bank: int = 0) -> None:
        """Open a session towards the granter; all blocks that will be offered lie in this bank."""
        ...

    def offer(self, session_id: bytes, fragments: Sequence[tuple[int, int]]) -> None:
        """`(fragment index, local block)` pairs whose KV is complete; the blocks stay untouched until the end event."""
        ...

    def probe(self, session_id: bytes) -> None:
        """Say by `OutgoingCaughtUp` when what was offered is at the peer; a hint, which may come early or never."""
        ...

    def finish(self, session_id: bytes, tail: Tail) -> None:
        """Everything was offered; the session completes once the peer has all of it."""
        ...

    def abandon(self, session_id: bytes, reason: str) -> None:
        """Give up; the peer is told, and the session ends in `OutgoingFailed`."""
        ...

    def poll(self) -> list[TransferEvent]:
        """Events since the last call, oldest first."""
        ...


class HostBlocks(Protocol):
    """The bytes of some blocks in host memory, in the order they were asked for, until `release`."""

    @property
    def blocks(self) -> list[memoryview]:
        """One view per block, contiguous; waits for a copy from a device that is under way."""
        ...

    @property
    def runs(self) -> list[memoryview]:
        """The same bytes in the same order, blocks that are neighbours in memory in one view."""
        ...

    def commit(self, places: Sequence[int]) -> None:
        """Of `land`: the blocks at these places hold their bytes; returns once the pool itself has them."""
        ...

    def release(self) -> None:
        """The views are used no more. May be called twice."""
        ...


class BlockSource(Protocol):
    """A pool that blocks are sent from. Called on the transfer thread only."""

    @property
    def num_blocks(self) -> int:
        """Blocks of the pool."""
        ...

    @property
    def block_bytes(self) -> int:
        """Bytes of one block."""
        ...

    @property
    def generations(self) -> NDArray[np.uint64]:
        """One number per block; the owner raises it before it writes new content."""
        ...

    @property
    def segment(self) -> str:
        """Path of a file from which processes of this host can copy blocks (`KVStorage.attach`); empty = none."""
        ...

    @property
    def frame_bytes(self) -> int | None:
        """Most bytes that one `read` or `land` may ask for; None = any number."""
        ...

    @property
    def copies_on_device(self) -> bool:
        """Who maps `segment` lets a device copy the blocks: no digest of theirs is ever checked."""
        ...

    def read(self, blocks: Sequence[int]) -> HostBlocks | None:
        """The content of these blocks, which stay untouched until `release`. None: no room now, ask after a release."""
        ...


class PeerPool(Protocol):
    """A peer's pool as this process sees it; read-only."""

    @property
    def num_blocks(self) -> int:
        """Blocks of the pool."""
        ...

    @property
    def block_bytes(self) -> int:
        """Bytes of one block."""
        ...

    @property
    def generations(self) -> NDArray[np.uint64]:
        """The owner's, as they are now."""
        ...

    def close(self) -> None:
        """Let go of it. Safe to call twice."""
        ...


@runtime_checkable
class DirectPeerPool(PeerPool, Protocol):
    """One whose blocks a device copies into our pool by itself: their bytes never pass the host."""

    def copy(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy the peer's blocks into ours; they are there when this returns. The caller checks generations."""
        ...


class HostPeerPool(PeerPool, Protocol):
    """One in host memory."""

    def read(self, blocks: Sequence[int]) -> HostBlocks:
        """The content of these blocks, as it is now."""
        ...

    def slice_pool(self, part: HeadSlice) -> SlicedPool:
        """The same blocks, of which some of the heads are wanted; not after `close`."""
        ...


class BlockSink(Protocol):
    """A pool that blocks arrive in. Called on the transfer thread only."""

    def attach(self, path: str) -> HostPeerPool | DirectPeerPool:
        """The pool of a peer on this host that names it so. Raises OSError, or WireError for what is no pool."""
        ...

    def land(self, blocks: Sequence[int]) -> HostBlocks | None:
        """Writable memory for what is to come into these blocks. None: no room now, ask after a release."""
        ...


class DevicePool(Protocol):
    """A pool of blocks in a device's memory. Host buffers are those of `StagedStorage`, page-locked if possible."""

    @property
    def num_blocks(self) -> int: ...

    @property
    def block_bytes(self) -> int: ...

    @property
    def generations(self) -> NDArray[np.uint64]: ...

    def gather(self, blocks: Sequence[int], buffer: memoryview) -> Callable[[], None]:
        """Begin to copy these blocks to the buffer, one after the other; the call returned waits until they are there.

        Blocks are read as they are when all device work submitted so far is done.
        """
        ...

    def scatter(self, buffer: memoryview, places: Sequence[int], blocks: Sequence[int]) -> None:
        """Copy place `places[i]` of the buffer to `blocks[i]`; on return, device work submitted later sees it."""
        ...


class BlockMover(BlockSource, BlockSink, Protocol):
    """Blocks, or slices of them, that come and go."""


class BlockStorage(BlockMover, Protocol):
    """A worker's pool."""

    def slice_pool(self, part: HeadSlice) -> DevicePool:
        """The same blocks, of which a peer whose group has another width sees some of the heads only."""
        ...
