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
from penstock.workers.scheduler.scheduler import Scheduler
from penstock.workers.transfer.port import (
    Arrived,
    Incoming,
    IncomingClosed,
    IncomingFailed,
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
    """Sessions granted to peers' prefills (incoming) and opened by own prefills (outgoing)."""

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
                self._transfer.abandon(session_id, "the request ended at its first token")

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
                scheduler.kv_arrived(key, tail.tokens, now)
            case IncomingFailed(reason=reason, cause=cause):
                del self._incoming[key]
                self._observation.arrived(key, now, cause)
                log.info("incoming KV of slot %d failed: %s", key.slot, reason)
                scheduler.kv_failed(key, now)
            case IncomingClosed():
                del self._incoming[key]
                scheduler.kv_closed(key, now)
            case OutgoingDone():
                del self._outgoing[key]
                self._observation.sent(key, now)
                scheduler.kv_sent(key, now)
            case OutgoingFailed(reason=reason, cause=cause):
                del self._outgoing[key]
                self._observation.sent(key, now, cause)
                log.info("outgoing KV of slot %d failed: %s", key.slot, reason)
                scheduler.kv_sent(key, now)
