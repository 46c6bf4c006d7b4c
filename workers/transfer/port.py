"""The face of KV transfer towards the engine: what it may ask, and the events it gets back.

The engine thread calls these methods; none blocks, and a transfer thread does the work. Implemented by
`engine.py` of this folder over shared memory and TCP, and by a fake in tests that reorders, repeats, delays and drops.

Invariants the engine relies on:
- after `Arrived`, `IncomingFailed` or `IncomingClosed` nobody writes the session's blocks any more;
- after `OutgoingDone` or `OutgoingFailed` nobody reads the session's source blocks for it any more;
- every `expect` ends in exactly one of `Arrived`, `IncomingFailed`, `IncomingClosed`, every `start` in exactly one
  of `OutgoingDone`, `OutgoingFailed`; unknown ids in the other calls are ignored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from penstock.workers.protocol import Grant, Tokens
from penstock.workers.totals import TransferCause


@dataclass(frozen=True, slots=True)
class Tail:
    """What prefill knows at the end besides the KV: the first generated token(s), in order."""

    tokens: Tokens


@dataclass(frozen=True, slots=True)
class Incoming:
    """A session this worker granted: fragment i lands in `blocks[i]`, if its generation is still `generations[i]`."""

    session_id: bytes
    epoch: int
    blocks: Tokens
    generations: tuple[int, ...]
    lease_s: float


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


TransferEvent = Arrived | IncomingFailed | IncomingClosed | OutgoingDone | OutgoingFailed


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

    def start(self, grant: Grant) -> None:
        """Open a session towards the granter."""
        ...

    def offer(self, session_id: bytes, fragments: Sequence[tuple[int, int]]) -> None:
        """`(fragment index, local block)` pairs whose KV is complete; the blocks stay untouched until the end event."""
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
