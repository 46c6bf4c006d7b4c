"""KV transfer of a whole group as one: what the engine asks goes to every rank, and ends when it has ended on each.

Rank 0's engine thread uses it in place of the transfer engine (`TransferPort`). Every rank has a transfer engine of its
own, which moves its own KV heads; commands to the followers travel on the channel
of steps, behind the plans that wrote the blocks they speak of. Knows neither sockets nor bytes of KV.

Invariants: a session ends once, after its final event on every rank; it has arrived if it has on all of them; as soon
as it fails on one rank the others are told to give it up. On a rank that is lost it has failed.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from penstock.workers.parallel.group_messages import (
    AbandonSession,
    ExpectSession,
    FinishSession,
    ForgetSession,
    GroupMessage,
    OfferBlocks,
    SessionOver,
    StartSession,
)
from penstock.workers.protocol import Grant
from penstock.workers.totals import TransferCause
from penstock.workers.transfer.endpoint import TransferCounters
from penstock.workers.transfer.engine import TransferEngine
from penstock.workers.transfer.port import (
    Arrived,
    Incoming,
    IncomingClosed,
    IncomingFailed,
    OutgoingCaughtUp,
    OutgoingDone,
    OutgoingFailed,
    Tail,
    TransferEvent,
)

log = logging.getLogger(__name__)

_WHOLE = (Arrived, OutgoingDone)


@dataclass(frozen=True, slots=True)
class GroupRanks:
    """Which ranks have which blocks: `width` ranks share a bank of `bank_blocks`; a group has one bank or several."""

    width: int
    bank_blocks: int = 0  # 0: there is one bank

    def of(self, bank: int) -> range:
        """The ranks with a part of every block of the bank."""
        return range(bank * self.width, (bank + 1) * self.width)

    def local(self, blocks: Sequence[int], bank: int) -> tuple[int, ...]:
        """The places of the bank's blocks in its ranks' storages."""
        first = bank * self.bank_blocks
        return tuple(int(block) - first for block in blocks)


@dataclass(slots=True)
class _Session:
    incoming: bool
    bank: int
    open_on: set[int]  # ranks without a final event; looked up only
    worst: TransferEvent | None = None  # the first event of a rank where it did not end whole
    own: TransferEvent | None = None  # of the bank's first rank, with the tail
    given_up: bool = False


class GroupTransfer:
    """See `TransferPort`, whose events are those of the group."""

    def __init__(self, own: TransferEngine, ranks: GroupRanks, send: Callable[[GroupMessage], object]) -> None:
        """`send` puts a message on the channel of steps."""
        self._own = own
        self._ranks = ranks
        self._send = send
        self._sessions: dict[bytes, _Session] = {}
        self._heard: deque[tuple[int, SessionOver]] = deque()
        self._probed: list[TransferEvent] = []
        self._lost: frozenset[int] = frozenset()  # ranks

    @property
    def address(self) -> str:
        """See `TransferPort.address`; rank 0's."""
        return self._own.address

    def expect(self, session: Incoming) -> None:
        """See `TransferPort.expect`."""
        bank = session.bank
        self._open(session.session_id, bank, incoming=True)
        blocks = self._ranks.local(session.blocks, bank)
        self._send(ExpectSession(bank, session.session_id, session.epoch, blocks, session.generations, session.lease_s))
        if bank == 0:
            self._own.expect(session)

    def forget(self, session_id: bytes) -> None:
        """See `TransferPort.forget`."""
        session = self._sessions.get(session_id)
        if session is not None:
            self._give_up(session_id, session, "forgotten")

    def start(self, grant: Grant, bank: int = 0) -> None:
        """See `TransferPort.start`."""
        self._open(grant.session_id, bank, incoming=False)
        self._send(
            StartSession(
                bank,
                grant.session_id,
                grant.worker_id,
                grant.epoch,
                grant.addresses,
                grant.host_id,
                grant.first_block,
                grant.blocks,
                grant.generations,
                grant.lease_s,
                grant.compatibility,
            )
        )
        if bank == 0:
            self._own.start(grant)

    def offer(self, session_id: bytes, fragments: Sequence[tuple[int, int]]) -> None:
        """See `TransferPort.offer`."""
        session = self._sessions.get(session_id)
        if session is not None and fragments:
            indices, blocks = zip(*fragments, strict=True)
            self._send(OfferBlocks(session_id, tuple(map(int, indices)), self._ranks.local(blocks, session.bank)))
            self._own.offer(session_id, fragments)

    def probe(self, session_id: bytes) -> None:
        """See `TransferPort.probe`; rank 0 answers for all, or, where it has no part of the bank, at once."""
        session = self._sessions.get(session_id)
        if session is not None and session.bank == 0:
            self._own.probe(session_id)
        elif session is not None:
            self._probed.append(OutgoingCaughtUp(session_id))

    def finish(self, session_id: bytes, tail: Tail) -> None:
        """See `TransferPort.finish`; every rank sends the same tail."""
        if session_id in self._sessions:
            self._send(FinishSession(session_id, tail.tokens, tail.fragments))
            self._own.finish(session_id, tail)

    def abandon(self, session_id: bytes, reason: str) -> None:
        """See `TransferPort.abandon`."""
        session = self._sessions.get(session_id)
        if session is not None:
            self._give_up(session_id, session, reason)

    def heard(self, rank: int, over: SessionOver) -> None:
        """A follower's final event of a session; from any thread. Wake the engine thread after it."""
        self._heard.append((rank, over))

    def lose(self, rank: int) -> None:
        """This rank has ended: so have its sessions, those asked for from now on too. From any thread; then wake."""
        self._lost |= {rank}

    def poll(self) -> list[TransferEvent]:
        """See `TransferPort.poll`."""
        events, self._probed = self._probed, []
        for event in self._own.poll():
            if isinstance(event, OutgoingCaughtUp):
                events.append(event)
            else:
                self._ended(0, event, events)
        while self._heard:
            rank, over = self._heard.popleft()
            self._ended(rank, event_of(over), events)
        if self._lost:
            self._end_lost(events)
        return events

    def stats(self) -> TransferCounters:
        """Rank 0's counters."""
        return self._own.stats()

    def stop(self) -> None:
        """Ends rank 0's transfer engine; followers end theirs when they end."""
        self._own.stop()

    def _open(self, session_id: bytes, bank: int, *, incoming: bool) -> None:
        self._sessions.setdefault(session_id, _Session(incoming, bank, set(self._ranks.of(bank))))

    def _give_up(self, session_id: bytes, session: _Session, reason: str) -> None:
        session.given_up = True
        if session.incoming:
            self._send(ForgetSession(session_id))
            self._own.forget(session_id)
        else:
            self._send(AbandonSession(session_id, reason))
            self._own.abandon(session_id, reason)

    def _end_lost(self, events: list[TransferEvent]) -> None:
        """The final events that lost ranks cannot send any more."""
        for session_id, session in list(self._sessions.items()):
            for rank in sorted(self._lost & session.open_on):
                failed = IncomingFailed if session.incoming else OutgoingFailed
                self._ended(rank, failed(session_id, f"rank {rank} is lost", TransferCause.PEER_LOST), events)

    def _ended(self, rank: int, event: TransferEvent, events: list[TransferEvent]) -> None:
        session = self._sessions.get(event.session_id)
        if session is None or rank not in session.open_on:
            log.warning("rank %d: %s for a session that is not open there", rank, type(event).__name__)
            return
        session.open_on.discard(rank)
        if rank == self._ranks.of(session.bank).start:
            session.own = event
        if not isinstance(event, _WHOLE) and session.worst is None:
            session.worst = event
            if session.open_on and not session.given_up:
                self._give_up(event.session_id, session, f"it failed on rank {rank}")
        if not session.open_on:
            del self._sessions[event.session_id]
            end = session.worst or session.own
            if end is not None:
                events.append(end)


def over_of(event: TransferEvent) -> SessionOver:
    """A follower's event as it travels to rank 0."""
    match event:
        case IncomingFailed(session_id, reason, cause) | OutgoingFailed(session_id, reason, cause):
            return SessionOver(session_id, type(event).__name__, reason, cause.value)
        case Arrived(session_id, tail):
            return SessionOver(session_id, type(event).__name__, "", "", tail.tokens, tail.fragments)
        case _:
            return SessionOver(event.session_id, type(event).__name__, "", "")


def event_of(over: SessionOver) -> TransferEvent:
    """Inverse of `over_of`; what is not known counts as a failure."""
    match over.event:
        case "Arrived":
            return Arrived(over.session_id, Tail(over.tail, over.fragments))
        case "OutgoingDone":
            return OutgoingDone(over.session_id)
        case "IncomingClosed":
            return IncomingClosed(over.session_id)
        case "OutgoingFailed":
            return OutgoingFailed(over.session_id, over.reason, _cause(over.cause))
        case _:
            return IncomingFailed(over.session_id, over.reason, _cause(over.cause))


def _cause(value: str) -> TransferCause:
    try:
        return TransferCause(value)
    except ValueError:
        return TransferCause.REFUSED
