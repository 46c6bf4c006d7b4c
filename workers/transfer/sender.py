"""The sending half: sessions this worker started towards the granters, and one connection to each of them.

Runs on the transfer thread, called by `engine.py` (commands, sweep) and `connection.py` (messages). Opens connections
through the function it is given and reads blocks of its own storage; otherwise it does no I/O.

Frames carry about a megabyte of blocks, so that the receiver checks one while the next is on its way. A session ends
with its removal from its peer; before its end event goes out, `scrub` makes sure that nobody reads its blocks for TCP,
and generations tell readers in shared memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_64_intdigest

from penstock.workers.errors import WireError
from penstock.workers.protocol import Grant
from penstock.workers.totals import TransferCause
from penstock.workers.transfer.connection import Landing
from penstock.workers.transfer.endpoint import Channel, Endpoint
from penstock.workers.transfer.incoming import SessionError
from penstock.workers.transfer.messages import (
    MAX_OFFER_ENTRIES,
    OFFER_DTYPE,
    Abandon,
    Ack,
    Finish,
    Goodbye,
    Hello,
    Message,
    Missing,
    Offer,
    Open,
    Ping,
    Pong,
    Reject,
    Welcome,
)
from penstock.workers.transfer.outgoing import OutgoingSession
from penstock.workers.transfer.port import OutgoingDone, OutgoingFailed, Tail

FRAME_TARGET_BYTES = 1 << 20
MAX_BACKLOG_BYTES = 4 << 20  # per connection; more waits in its session
PINGS_PER_LEASE = 4


@dataclass(slots=True)
class _Peer:
    """A granter. `shared_memory` is None until it has welcomed us; sessions in `ready` have something to send."""

    channel: Channel
    heard: float
    pinged: float
    shared_memory: bool | None = None
    sessions: dict[bytes, OutgoingSession] = field(default_factory=dict)
    ready: dict[bytes, None] = field(default_factory=dict)


class Sender:
    """All outgoing sessions. `connect` opens a connection to host:port; it may raise OSError."""

    def __init__(self, endpoint: Endpoint, connect: Callable[[str], Channel]) -> None:
        self._endpoint = endpoint
        self._connect = connect
        self._counters = endpoint.counters
        self._peers: dict[str, _Peer] = {}  # by address
        self._homes: dict[bytes, str] = {}  # session id -> its peer's address
        self._block_bytes = int(endpoint.storage.data.shape[1])
        room = min(FRAME_TARGET_BYTES, endpoint.settings.max_frame_bytes) // self._block_bytes
        self._blocks_per_frame = max(1, min(room, MAX_OFFER_ENTRIES))

    # --- the engine's side ----------------------------------------------------------------------------------------

    def start(self, grant: Grant) -> None:
        """Open a session towards the granter."""
        if grant.session_id in self._homes:
            return
        self._counters.outgoing_started += 1
        if grant.compatibility != self._endpoint.compatibility:
            reason = "incompatible: KV layout, model revision or codec differ"
            self._lose(grant.session_id, reason, TransferCause.INCOMPATIBLE)
            return
        now = self._endpoint.clock()
        try:
            peer = self._peers.get(grant.address) or self._new_peer(grant.address, now)
        except (OSError, ValueError) as error:
            self._lose(grant.session_id, f"cannot reach {grant.worker_id}: {error}", TransferCause.UNREACHABLE)
            return
        if not peer.sessions:
            peer.heard = now  # an idle peer owes no answer; silence counts from here
        peer.sessions[grant.session_id] = OutgoingSession(grant)
        self._homes[grant.session_id] = grant.address
        self._push(peer, grant.session_id)

    def offer(self, session_id: bytes, fragments: Sequence[tuple[int, int]]) -> None:
        """Send these blocks."""
        self._change(session_id, lambda session: session.offer(fragments))

    def finish(self, session_id: bytes, tail: Tail) -> None:
        """All blocks are offered."""
        self._change(session_id, lambda session: session.finish(tail))

    def abandon(self, session_id: bytes, reason: str, cause: TransferCause = TransferCause.ABANDONED) -> None:
        """Give a session up and tell the peer."""
        if session_id in self._homes:
            self._fail(self._peers[self._homes[session_id]], session_id, reason, cause, tell=True)

    def fail_all(self, reason: str) -> None:
        """End every session: this side goes away."""
        for session_id in list(self._homes):
            self.abandon(session_id, reason, TransferCause.STOPPED)

    def sweep(self, now: float) -> float | None:
        """Ping peers, and end sessions whose peer is silent. Returns the shortest lease in seconds."""
        leases: list[float] = []
        for peer in list(self._peers.values()):
            silent = bool(peer.sessions)
            for session_id, session in list(peer.sessions.items()):
                lease, finished = session.grant.lease_s, session.finished_at
                if now - peer.heard >= lease or (finished is not None and now - finished >= lease):
                    reason = f"no answer from the receiver for {lease:g} s"
                    self._fail(peer, session_id, reason, TransferCause.LEASE_EXPIRED, tell=True)
            if not peer.sessions:
                if silent and now - peer.heard >= lease:
                    peer.channel.fail("the receiver is silent")
                continue
            shortest = min(session.grant.lease_s for session in peer.sessions.values())
            leases.append(shortest)
            if peer.shared_memory is not None and now - peer.pinged >= shortest / PINGS_PER_LEASE:
                peer.pinged = now
                peer.channel.send(Ping())
        return min(leases, default=None)

    # --- the connections' side ------------------------------------------------------------------------------------

    def on_opened(self, channel: Channel) -> None:
        """Introduce this worker."""
        endpoint = self._endpoint
        segment = "" if endpoint.settings.transport == "tcp" else endpoint.storage.path
        num_blocks = int(endpoint.storage.data.shape[0])
        channel.send(
            Hello(endpoint.worker_id, endpoint.compatibility, endpoint.host_id, segment, num_blocks, self._block_bytes)
        )

    def on_message(self, channel: Channel, message: Message) -> None:
        """Act on one answer of the peer. Raises WireError for a message that has no place here."""
        peer = self._peer_of(channel)
        if peer is None:
            return
        peer.heard = self._endpoint.clock()
        match message:
            case Welcome(shared_memory):
                peer.shared_memory = shared_memory
                self._pump(peer)
            case Goodbye(reason):
                channel.fail(f"refused: {reason}")
            case Ack(session_id, epoch):
                self._acknowledge(peer, session_id, epoch)
            case Missing(session_id, epoch, fragments):
                if self._owns(peer, session_id, epoch):
                    self._counters.resends += 1
                    self._change(session_id, lambda session: session.resend(fragments))
            case Reject(session_id, epoch, reason):
                if self._owns(peer, session_id, epoch):
                    said = f"refused by the receiver: {reason}"
                    self._fail(peer, session_id, said, TransferCause.REFUSED, tell=False)
            case Pong():
                pass
            case _:
                raise WireError(f"transfer: {type(message).__name__} from a receiver")

    def on_payload(self, channel: Channel, offer: Offer) -> Landing:
        """Receivers send no blocks."""
        raise WireError("transfer: blocks from a receiver")

    def on_landed(self, channel: Channel, landing: Landing) -> None:
        """Never reached, as `on_payload` refuses."""
        raise WireError("transfer: blocks from a receiver")

    def on_drained(self, channel: Channel) -> None:
        """The connection has room again."""
        peer = self._peer_of(channel)
        if peer is not None:
            self._pump(peer)

    def on_closed(self, channel: Channel, reason: str) -> None:
        """The granter is gone; so are the sessions towards it. The next `start` opens a new connection."""
        peer = self._peer_of(channel)
        if peer is None:
            return
        for session_id in list(peer.sessions):
            self._fail(peer, session_id, f"receiver lost: {reason}", TransferCause.PEER_LOST, tell=False)
        self._peers = {address: other for address, other in self._peers.items() if other is not peer}

    # --- inside ---------------------------------------------------------------------------------------------------

    def _new_peer(self, address: str, now: float) -> _Peer:
        self._peers[address] = _Peer(self._connect(address), now, now)
        return self._peers[address]

    def _peer_of(self, channel: Channel) -> _Peer | None:
        return next((peer for peer in self._peers.values() if peer.channel is channel), None)

    def _owns(self, peer: _Peer, session_id: bytes, epoch: int) -> bool:
        session = peer.sessions.get(session_id)
        return session is not None and session.grant.epoch == epoch

    def _change(self, session_id: bytes, change: Callable[[OutgoingSession], None]) -> None:
        address = self._homes.get(session_id)
        if address is None:
            return
        peer = self._peers[address]
        try:
            change(peer.sessions[session_id])
        except SessionError as error:
            self._fail(peer, session_id, str(error), TransferCause.DAMAGED, tell=True)
        else:
            self._push(peer, session_id)

    def _push(self, peer: _Peer, session_id: bytes) -> None:
        peer.ready[session_id] = None
        self._pump(peer)

    def _pump(self, peer: _Peer) -> None:
        """Send in turns what the sessions have, as long as the connection takes it."""
        while peer.shared_memory is not None and peer.ready and peer.channel.backlog < MAX_BACKLOG_BYTES:
            session_id = next(iter(peer.ready))
            del peer.ready[session_id]
            session = peer.sessions[session_id]
            self._send_next(peer, session_id, session)
            if session.ready:
                peer.ready[session_id] = None

    def _send_next(self, peer: _Peer, session_id: bytes, session: OutgoingSession) -> None:
        channel, epoch = peer.channel, session.grant.epoch
        if not session.opened:
            session.opened = True
            channel.send(Open(session_id, epoch))
        faults = self._endpoint.faults
        room = self._blocks_per_frame if faults is None else faults.room(self._blocks_per_frame)
        batch = session.take(room)
        if faults is not None:
            batch = faults.choose(batch)
            faults.stall(faults.delay_send_s)
        if batch:
            self._send_blocks(peer, session, batch)
        if faults is not None:
            faults.left(len(batch))
        if session.finish_due and session.tail is not None:
            session.finished_at = self._endpoint.clock()
            channel.send(Finish(session_id, epoch, session.tail.tokens))

    def _send_blocks(self, peer: _Peer, session: OutgoingSession, batch: list[tuple[int, int]]) -> None:
        data, grant = self._endpoint.storage.data, session.grant
        entries: NDArray[np.void] = np.zeros(len(batch), OFFER_DTYPE)
        fragments = [fragment for fragment, _ in batch]
        blocks = [block for _, block in batch]
        entries["fragment"] = fragments
        entries["source_block"] = blocks
        entries["source_generation"] = self._endpoint.storage.generations[blocks]
        entries["target_generation"] = [grant.generations[fragment] for fragment in fragments]
        for place, (fragment, block) in enumerate(batch):
            if self._sampled(grant.session_id, fragment):
                entries["checked"][place] = 1
                entries["digest"][place] = xxh3_64_intdigest(data[block])
        inline = not peer.shared_memory
        payload = [memoryview(data[block]) for block in blocks] if inline else ()
        peer.channel.send(Offer(grant.session_id, grant.epoch, inline, entries), payload)
        self._counters.fragments_sent += len(batch)

    def _sampled(self, session_id: bytes, fragment: int) -> bool:
        """Whether this fragment's digest is sent; the choice differs from session to session."""
        share = self._endpoint.settings.digest_sample
        if share >= 1.0:
            return True
        return xxh3_64_intdigest(session_id, seed=fragment) < share * 2**64

    def _acknowledge(self, peer: _Peer, session_id: bytes, epoch: int) -> None:
        if self._owns(peer, session_id, epoch) and peer.sessions[session_id].tail is not None:
            self._remove(peer, session_id)
            self._counters.outgoing_done += 1
            self._endpoint.emit(OutgoingDone(session_id))

    def _fail(self, peer: _Peer, session_id: bytes, reason: str, cause: TransferCause, *, tell: bool) -> None:
        session = peer.sessions[session_id]
        self._remove(peer, session_id)
        if tell and session.opened:
            peer.channel.send(Abandon(session_id, session.grant.epoch, reason))
        self._lose(session_id, reason, cause)

    def _remove(self, peer: _Peer, session_id: bytes) -> None:
        peer.channel.scrub(session_id)
        peer.ready.pop(session_id, None)
        del peer.sessions[session_id]
        del self._homes[session_id]

    def _lose(self, session_id: bytes, reason: str, cause: TransferCause) -> None:
        self._counters.outgoing_failed += 1
        self._endpoint.emit(OutgoingFailed(session_id, reason, cause))
