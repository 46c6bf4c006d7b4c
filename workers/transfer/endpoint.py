"""What both halves of the transfer know of their own worker, and the counters they share.

Built by `engine.py`, used by `sender.py` and `receiver.py`. Everything but the counters is fixed for the worker's life.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from penstock.workers.kv.sliced_pool import HeadSlice
from penstock.workers.settings import TransferSettings
from penstock.workers.transfer.head_slices import ALONE, HeadRange, HeadShare
from penstock.workers.transfer.messages import Message
from penstock.workers.transfer.port import BlockMover, BlockStorage, TransferEvent
from penstock.workers.transfer.staging import staged_slices

if TYPE_CHECKING:  # it imports torch, which a worker without a device does without
    from penstock.workers.transfer.lane_frames import Lanes


class Channel(Protocol):
    """One connection as sender and receiver see it; `connection.py` is the real one, tests have a hostile one."""

    @property
    def backlog(self) -> int:
        """Bytes queued and not yet taken by the network."""
        ...

    def send(
        self, message: Message, payload: Sequence[memoryview] = (), release: Callable[[], None] | None = None
    ) -> None:
        """Queue a frame. Payload views are read until they have left or `scrub` was called; then `release` is."""
        ...

    def scrub(self, session_id: bytes) -> None:
        """Drop the session's queued frames and read none of its payload views any more."""
        ...

    def resume(self) -> None:
        """Ask the handler again where the payload goes for which it had no room."""
        ...

    def fail(self, reason: str) -> None:
        """End the connection; its handler hears of it once."""
        ...


@dataclass(slots=True)
class TransferCounters:
    """Running totals since start. Started sessions equal the ended ones plus those still open."""

    incoming_started: int = 0
    incoming_arrived: int = 0
    incoming_failed: int = 0
    incoming_closed: int = 0
    outgoing_started: int = 0
    outgoing_done: int = 0
    outgoing_failed: int = 0
    fragments_sent: int = 0
    fragments_landed: int = 0
    fragments_checked: int = 0  # by digest and generation, or by generation alone where no digest is asked for
    bytes_landed: int = 0
    duplicates: int = 0
    digest_failures: int = 0
    generation_failures: int = 0
    resends: int = 0  # rounds in which fragments were asked for again
    rejected: int = 0  # frames for sessions that are unknown, over, or another peer's
    connections_refused: int = 0

    @property
    def open_sessions(self) -> int:
        """Sessions started and not yet ended, both ways."""
        incoming = self.incoming_started - self.incoming_arrived - self.incoming_failed - self.incoming_closed
        return incoming + self.outgoing_started - self.outgoing_done - self.outgoing_failed


@dataclass(frozen=True, slots=True)
class Endpoint:
    """This worker's side of every transfer. `emit` hands an event to the engine thread and wakes it."""

    settings: TransferSettings
    storage: BlockStorage
    worker_id: str
    host_id: str
    compatibility: str
    emit: Callable[[TransferEvent], None]
    clock: Callable[[], float]
    counters: TransferCounters = field(default_factory=TransferCounters)
    share: HeadShare = ALONE  # of the model's KV heads, in this rank's blocks
    pieces: int = 1  # of a block: runs of bytes with all its heads, one per layer and part
    lanes: Lanes | None = None  # beside connections, where blocks travel by NCCL
    post: Callable[[Callable[[], None]], None] = field(default=lambda command: command())  # to the transfer thread
    _slices: dict[HeadRange, BlockMover] = field(default_factory=dict)

    def pool_of(self, heads: HeadRange) -> BlockMover:
        """The pool as a connection sees it that carries these heads, which are some of this rank's."""
        own = self.share.heads
        if heads == own:
            return self.storage
        found = self._slices.get(heads)
        if found is None:
            found = self._slices[heads] = staged_slices(self.storage.slice_pool(self._slice_of(heads)))
        return found

    def part_of(self, heads: HeadRange) -> HeadSlice | None:
        """These heads of this rank's blocks; None for all of them."""
        return None if heads == self.share.heads else self._slice_of(heads)

    def _slice_of(self, heads: HeadRange) -> HeadSlice:
        own = self.share.heads
        return HeadSlice(self.pieces, own.count, heads.first - own.first, heads.count)
