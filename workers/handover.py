"""The KV transfer sessions of one engine: which sequence each belongs to, and what their events mean to the scheduler.

Used by `engine.py`, on its thread only. It joins three parties that know nothing of each other: the scheduler (keys
and blocks), the transfer port (sessions and bytes), and grants (what a decode worker promises). Knows no sockets.

Invariants: a session is announced to the transfer side before its grant leaves; a sequence has at most one session;
every session leaves the maps by exactly one final event of the transfer side.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from penstock.workers.observation import Observation
from penstock.workers.protocol import EndReason, FailureCode, Grant
from penstock.workers.scheduler.events import GrantedEvent, Offer, SentTail, SequenceKey
from penstock.workers.scheduler.moving import MovedTail
from penstock.workers.scheduler.scheduler import Scheduler
from penstock.workers.totals import TransferCause
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
    TransferPort,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class GranterIdentity:
    """What every grant of this worker says about it."""

    worker_id: str
    epoch: int
    host_id: str
    compatibility: str
    lease_s: float
    addresses: tuple[tuple[str, ...], ...] = ()  # of each bank's ranks; empty: the transfer's own is all there is


class HandOver:
    """Sessions granted to peers (incoming), and opened by own prefills and moving sequences (outgoing)."""

    def __init__(
        self,
        transfer: TransferPort,
        identity: GranterIdentity,
        new_session_id: Callable[[], bytes],
        observation: Observation | None = None,
    ) -> None:
        self._transfer = transfer
        self._identity = identity
        self._new_session_id = new_session_id  # 16 unguessable bytes
        self._observation = observation or Observation()
        self._keys: dict[bytes, SequenceKey] = {}
        self._incoming: dict[SequenceKey, bytes] = {}
        self._outgoing: dict[SequenceKey, bytes] = {}
        self._moves: set[SequenceKey] = set()  # of the outgoing ones: sequences that run
        self._dropped: set[SequenceKey] = set()  # looked up only, never iterated

    def __len__(self) -> int:
        return len(self._keys)

    def problem_with(self, key: SequenceKey, grant: Grant | None) -> tuple[FailureCode, str] | None:
        """Why a prefill cannot send its blocks under this grant."""
        if grant is None:
            return None
        if key in self._dropped:  # its sequence is over, its session not yet: the name is taken until the final event
            return FailureCode.QUEUE_FULL, "slot and attempt still name a cancelled transfer"
        if self._keys.get(grant.session_id, key) != key:
            return FailureCode.BAD_REQUEST, "the grant is already used by another request"
        if grant.compatibility != self._identity.compatibility:
            return FailureCode.INCOMPATIBLE, f"KV blocks of worker {grant.worker_id} have another layout or revision"
        return None

    def grant(self, event: GrantedEvent) -> Grant:
        """Open an incoming session over the blocks just reserved; the grant may be sent from here on."""
        me, session_id = self._identity, self._new_session_id()
        self._keys[session_id] = event.key
        self._incoming[event.key] = session_id
        blocks, bank = event.blocks, event.bank
        first, *others = me.addresses[bank] if me.addresses else (self._transfer.address,)
        self._transfer.expect(Incoming(session_id, me.epoch, blocks, event.generations, me.lease_s, bank))
        return Grant(
            session_id,
            me.worker_id,
            me.epoch,
            first,
            me.host_id,
            event.first_block,
            blocks,
            event.generations,
            me.lease_s,
            me.compatibility,
            tuple(others),
        )

    def open(self, key: SequenceKey, grant: Grant, bank: int = 0) -> bool:
        """Open an outgoing session at once, so that its lease is renewed while the prefill waits. False: repeated.

        The prefill's blocks will lie in `bank`.
        """
        if key in self._outgoing:
            return False
        self._keys[grant.session_id] = key
        self._outgoing[key] = grant.session_id
        self._observation.sending(key, len(grant.blocks))
        self._transfer.start(grant, bank)
        return True

    def open_move(self, key: SequenceKey, grant: Grant, bank: int) -> None:
        """Open an outgoing session for a running sequence, whose blocks lie in `bank`."""
        if self.open(key, grant, bank):
            self._moves.add(key)

    def probe(self, key: SequenceKey) -> None:
        """Have the scheduler told when the peer has what was offered of a moving sequence so far."""
        if (session_id := self._outgoing.get(key)) is not None:
            self._transfer.probe(session_id)

    def move(self, offers: list[Offer], tails: list[MovedTail]) -> None:
        """Send what moving sequences have: blocks as they fill, and in the end the rest."""
        self.offer(offers, [])
        for tail in tails:
            if (session_id := self._outgoing.get(tail.key)) is not None:
                self._transfer.finish(session_id, Tail(tail.tokens, tail.fragments))

    def offer(self, offers: list[Offer], tails: list[SentTail]) -> None:
        """Send newly complete blocks and the tails of finished prefills."""
        for offer in offers:
            session_id = self._outgoing.get(offer.key)
            if session_id is not None:
                self._observation.offered(offer.key)
                self._transfer.offer(session_id, offer.fragments)
        for tail in tails:
            session_id = self._outgoing.get(tail.key)
            if session_id is None:
                continue
            if tail.end is EndReason.NONE:
                self._observation.offered(tail.key)
                self._transfer.finish(session_id, Tail((tail.first_token,)))
            else:
                self._transfer.abandon(session_id, "the request ended here")

    def drop(self, key: SequenceKey, reason: str) -> None:
        """The sequence is over: ask for the end of its session, whose final event still comes."""
        incoming, outgoing = self._incoming.get(key), self._outgoing.get(key)
        if incoming is not None or outgoing is not None:
            self._dropped.add(key)
        if incoming is not None:
            self._transfer.forget(incoming)
        if outgoing is not None:
            self._transfer.abandon(outgoing, reason)

    def poll(self, scheduler: Scheduler, now: float) -> None:
        """Tell the scheduler what the transfer side reports."""
        for event in self._transfer.poll():
            if isinstance(event, OutgoingCaughtUp):
                if (caught_up := self._keys.get(event.session_id)) is not None:
                    scheduler.moves.caught_up(caught_up)
                continue
            key = self._keys.pop(event.session_id, None)
            if key is None:
                log.warning("%s for an unknown transfer session", type(event).__name__)
                continue
            self._dropped.discard(key)
            self._apply(event, key, scheduler, now)

    def _apply(self, event: TransferEvent, key: SequenceKey, scheduler: Scheduler, now: float) -> None:
        match event:
            case Arrived(tail=tail):
                del self._incoming[key]
                self._observation.arrived(key, now)
                if tail.fragments is None:
                    scheduler.kv_arrived(key, tail.tokens, now)
                else:
                    scheduler.moves.arrived(key, tail.tokens)
            case IncomingFailed(reason=reason, cause=cause):
                del self._incoming[key]
                self._observation.arrived(key, now, cause)
                log.info("incoming KV of slot %d failed: %s", key.slot, reason)
                damaged = cause is TransferCause.MISMATCHED
                scheduler.kv_failed(key, now, FailureCode.KV_DAMAGED if damaged else FailureCode.TRANSFER_FAILED)
            case IncomingClosed():
                del self._incoming[key]
                scheduler.kv_closed(key, now)
            case OutgoingDone():
                del self._outgoing[key]
                self._observation.sent(key, now)
                if key in self._moves:
                    self._moves.discard(key)
                    scheduler.moves.done(key)
                else:
                    scheduler.kv_sent(key, now)
            case OutgoingFailed(reason=reason, cause=cause):
                del self._outgoing[key]
                self._observation.sent(key, now, cause)
                log.info("outgoing KV of slot %d failed: %s", key.slot, reason)
                if key in self._moves:
                    self._moves.discard(key)
                    scheduler.moves.failed(key, reason)
                else:
                    scheduler.kv_sent(key, now)
