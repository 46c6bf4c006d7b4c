"""The sending half: sessions this rank started towards the granters, and one connection to each of their ranks.

A granting group may have several ranks that need heads of ours, or none; a session is over when the last of them has
acknowledged it, and with the first that fails.

Runs on the transfer thread, called by `engine.py` (commands, sweep) and `connection.py` (messages). Opens connections
through the function it is given and reads blocks of its own storage; otherwise it does no I/O.

A session ends with its removal from its peer; before its end event goes out, `scrub` makes sure that nobody reads its
blocks for TCP, and generations tell readers in shared memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from penstock.workers import fault_points
from penstock.workers.errors import WireError
from penstock.workers.fault_points import Point
from penstock.workers.protocol import Grant
from penstock.workers.totals import TransferCause
from penstock.workers.transfer.connection import Landing
from penstock.workers.transfer.endpoint import Channel, Endpoint
from penstock.workers.transfer.head_slices import HeadRange, reason_against
from penstock.workers.transfer.incoming import SessionError
from penstock.workers.transfer.messages import (
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
from penstock.workers.transfer.offering import OfferMaker
from penstock.workers.transfer.outgoing import OutgoingSession, Reading
from penstock.workers.transfer.port import OutgoingCaughtUp, OutgoingDone, OutgoingFailed, Tail

if TYPE_CHECKING:  # it imports torch, which a worker without a device does without
    from penstock.workers.transfer.lane_frames import Lanes, LaneSender

MAX_BACKLOG_BYTES = 4 << 20  # per connection; more waits in its session
PINGS_PER_LEASE = 4


@dataclass(slots=True)
class _Peer:
    """A granting rank and the `heads` it gets; sessions in `ready` have something to send."""

    channel: Channel
    heads: HeadRange
    offers: OfferMaker
    heard: float
    pinged: float
    shared_memory: bool | None = None  # until it has welcomed us
    pings: int = 0  # sent; what went before one has been taken in when it is answered
    pongs: int = 0
    most_blocks: int | None = None  # that it can take at once
    lane: LaneSender | None = None  # on which it gets them, where they travel by NCCL
    sessions: dict[bytes, OutgoingSession] = field(default_factory=dict)
    ready: dict[bytes, None] = field(default_factory=dict)

    @property
    def has_room(self) -> bool:
        """Another frame can go out."""
        if self.shared_memory is None or self.channel.backlog >= MAX_BACKLOG_BYTES:
            return False
        return self.lane is None or self.lane.has_room


class Sender:
    """All outgoing sessions. `connect` opens a connection to host:port; it may raise OSError."""

    def __init__(self, endpoint: Endpoint, connect: Callable[[str], Channel]) -> None:
        self._endpoint = endpoint
        self._connect = connect
        self._counters = endpoint.counters
        self._peers: dict[str, _Peer] = {}  # by address
        self._homes: dict[bytes, list[str]] = {}  # session id -> the addresses of its peers that are not done
        self._makers: dict[HeadRange, OfferMaker] = {}
        self._starved: dict[str, None] = {}  # addresses of peers that wait for room to stage blocks in

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
        addresses = grant.addresses
        mismatch = reason_against(self._endpoint.share.width, len(addresses))
        if mismatch is not None:
            self._lose(grant.session_id, mismatch, TransferCause.INCOMPATIBLE)
            return
        self._homes[grant.session_id] = []
        for rank, heads in self._endpoint.share.deliveries(len(addresses)):
            if not self._begin(grant, addresses[rank], heads):
                return
        for address in list(self._homes.get(grant.session_id, ())):
            self._push(self._peers[address], grant.session_id)

    def offer(self, session_id: bytes, fragments: Sequence[tuple[int, int]]) -> None:
        """Send these blocks."""
        self._change(session_id, lambda session: session.offer(fragments))

    def probe(self, session_id: bytes) -> None:
        """Say when the peers have what was offered."""
        for peer in [self._peers[address] for address in self._homes.get(session_id, ())]:
            peer.sessions[session_id].probe = 0
            self._ask(peer, peer.sessions[session_id])

    def finish(self, session_id: bytes, tail: Tail) -> None:
        """All blocks are offered."""
        self._change(session_id, lambda session: session.finish(tail))
        if self._homes.get(session_id) == []:  # no rank of the granter needs anything of ours
            self._done(session_id)

    def abandon(self, session_id: bytes, reason: str, cause: TransferCause = TransferCause.ABANDONED) -> None:
        """Give a session up and tell the peer."""
        if session_id in self._homes:
            self._fail(session_id, reason, cause)
            self._feed()

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
                    self._fail(session_id, reason, TransferCause.LEASE_EXPIRED)
            if not peer.sessions:
                if silent and now - peer.heard >= lease:
                    peer.channel.fail("the receiver is silent")
                continue
            shortest = min(session.grant.lease_s for session in peer.sessions.values())
            leases.append(shortest)
            if peer.shared_memory is not None and now - peer.pinged >= shortest / PINGS_PER_LEASE:
                peer.pinged, peer.pings = now, peer.pings + 1
                peer.channel.send(Ping())
        self._feed()
        return min(leases, default=None)

    # --- the connections' side ------------------------------------------------------------------------------------

    def on_opened(self, channel: Channel) -> None:
        """Introduce this worker."""
        peer, endpoint = self._peer_of(channel), self._endpoint
        if peer is None:
            return
        storage, held = endpoint.storage, endpoint.share.heads
        whole_only = storage.copies_on_device and peer.heads != held
        segment = "" if endpoint.settings.transport in ("tcp", "nccl") or whole_only else storage.segment
        who = (endpoint.worker_id, endpoint.compatibility, endpoint.host_id)
        lane = endpoint.lanes is not None
        channel.send(Hello(*who, segment, storage.num_blocks, storage.block_bytes, held, peer.heads, lane))

    def on_message(self, channel: Channel, message: Message) -> None:
        """Act on one answer of the peer. Raises WireError for a message that has no place here."""
        peer = self._peer_of(channel)
        if peer is None:
            return
        peer.heard = self._endpoint.clock()
        match message:
            case Welcome(shared_memory, frame_bytes, invitation):
                if self._endpoint.lanes is not None:
                    peer.lane = self._join(self._endpoint.lanes, peer, channel, invitation)
                peer.shared_memory = shared_memory
                peer.most_blocks = max(1, frame_bytes // peer.offers.block_bytes) if frame_bytes else None
                self._pump(peer)
            case Goodbye(reason):
                channel.fail(f"refused: {reason}")
            case Ack(session_id, epoch):
                self._acknowledge(peer, session_id, epoch)
            case Missing(session_id, epoch, fragments):
                if self._owns(peer, session_id, epoch):
                    self._counters.resends += 1
                    self._change_at(peer, session_id, lambda session: session.resend(fragments))
            case Reject(session_id, epoch, reason):
                if self._owns(peer, session_id, epoch):
                    said = f"refused by the receiver: {reason}"
                    self._fail(session_id, said, TransferCause.REFUSED, knows=peer)
            case Pong():
                peer.pongs += 1
                self._caught_up(peer)
            case _:
                raise WireError(f"transfer: {type(message).__name__} from a receiver")

    def on_payload(self, channel: Channel, offer: Offer, size: int) -> Landing:
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
        self._feed()

    def on_closed(self, channel: Channel, reason: str) -> None:
        """The granter is gone; so are the sessions towards it. The next `start` opens a new connection."""
        peer = self._peer_of(channel)
        if peer is None:
            return
        if peer.lane is not None:
            peer.lane.close()
        for session_id in list(peer.sessions):
            self._fail(session_id, f"receiver lost: {reason}", TransferCause.PEER_LOST, knows=peer)
        self._peers = {address: other for address, other in self._peers.items() if other is not peer}
        self._feed()

    # --- inside ---------------------------------------------------------------------------------------------------

    def _begin(self, grant: Grant, address: str, heads: HeadRange) -> bool:
        """Open the session towards one rank. False: it cannot be reached, and the session has failed."""
        now = self._endpoint.clock()
        try:
            peer = self._peers.get(address) or self._new_peer(address, heads, now)
        except (OSError, ValueError) as error:
            self._fail(grant.session_id, f"cannot reach {grant.worker_id}: {error}", TransferCause.UNREACHABLE)
            return False
        if not peer.sessions:
            peer.heard = now  # an idle peer owes no answer; silence counts from here
        peer.sessions[grant.session_id] = OutgoingSession(grant)
        self._homes[grant.session_id].append(address)
        return True

    def _new_peer(self, address: str, heads: HeadRange, now: float) -> _Peer:
        maker = self._makers.get(heads)
        if maker is None:
            maker = self._makers[heads] = OfferMaker(self._endpoint, self._endpoint.pool_of(heads))
        self._peers[address] = _Peer(self._connect(address), heads, maker, now, now)
        return self._peers[address]

    def _peer_of(self, channel: Channel) -> _Peer | None:
        return next((peer for peer in self._peers.values() if peer.channel is channel), None)

    def _address_of(self, peer: _Peer) -> str:
        return next(address for address, other in self._peers.items() if other is peer)

    def _owns(self, peer: _Peer, session_id: bytes, epoch: int) -> bool:
        session = peer.sessions.get(session_id)
        return session is not None and session.grant.epoch == epoch

    def _change(self, session_id: bytes, change: Callable[[OutgoingSession], None]) -> None:
        for address in tuple(self._homes.get(session_id, ())):
            if address in self._homes.get(session_id, ()):  # a change before may have ended the session
                self._change_at(self._peers[address], session_id, change)

    def _change_at(self, peer: _Peer, session_id: bytes, change: Callable[[OutgoingSession], None]) -> None:
        try:
            change(peer.sessions[session_id])
        except SessionError as error:
            self._fail(session_id, str(error), TransferCause.DAMAGED)
        else:
            self._push(peer, session_id)

    def _push(self, peer: _Peer, session_id: bytes) -> None:
        peer.ready[session_id] = None
        self._pump(peer)
        self._feed()

    def _pump(self, peer: _Peer) -> None:
        """Send in turns what the sessions have, as long as the connection takes it and blocks can be read."""
        while peer.has_room and peer.ready:
            session_id = next(iter(peer.ready))
            session = peer.sessions[session_id]
            if not self._send_next(peer, session):
                self._starved[self._address_of(peer)] = None
                return
            del peer.ready[session_id]
            if session.ready:
                peer.ready[session_id] = None

    def _feed(self) -> None:
        """Blocks may have left, and room to stage others with them: give it to who waits for it."""
        waiting, self._starved = self._starved, {}
        for address in waiting:
            if address in self._peers:
                self._pump(self._peers[address])

    def _send_next(self, peer: _Peer, session: OutgoingSession) -> bool:
        """Send one frame of blocks, and Finish after the last. False: no block can be read before others have left."""
        channel, grant = peer.channel, session.grant
        if not session.opened:
            session.opened = True
            channel.send(Open(grant.session_id, grant.epoch))
        inline = not peer.shared_memory
        if peer.lane is not None:
            count = self._send_on_lane(peer, peer.lane, session)
        else:
            reading = peer.offers.next_reading(session, inline=inline, most_blocks=peer.most_blocks)
            if reading is None:
                return False
            count = len(reading.batch)
            if reading.batch:
                self._send_blocks(peer, session, reading, inline=inline)
        if fault_points.plan is not None:
            for _ in range(count):
                fault_points.plan.reach(Point.TRANSFER_SENT, self._endpoint.worker_id)
        if session.finish_due and session.tail is not None:
            session.finished_at = self._endpoint.clock()
            channel.send(Finish(grant.session_id, grant.epoch, session.tail.tokens, session.tail.fragments))
        self._ask(peer, session)
        return True

    def _send_on_lane(self, peer: _Peer, lane: LaneSender, session: OutgoingSession) -> int:
        offer = lane.next_offer(session, self._endpoint.worker_id, lambda: self._pump(peer))
        if offer is None:
            return 0
        peer.channel.send(offer)
        self._counters.fragments_sent += len(offer.entries)
        return len(offer.entries)

    def _join(self, lanes: Lanes, peer: _Peer, channel: Channel, invitation: str) -> LaneSender:
        endpoint, part = self._endpoint, self._endpoint.part_of(peer.heads)
        return lanes.join(invitation, endpoint.post, lambda reason: channel.fail(f"lane: {reason}"), part)

    def _ask(self, peer: _Peer, session: OutgoingSession) -> None:
        """Ping behind the last block of a session that is probed: the peer takes in everything in order."""
        if session.probe_due:
            peer.pings += 1
            session.probe = peer.pings
            peer.channel.send(Ping())

    def _caught_up(self, peer: _Peer) -> None:
        """Tell of probed sessions of which no peer lacks anything any more."""
        for session_id, session in peer.sessions.items():
            if session.probe and session.probe <= peer.pongs:
                session.probe = None
                peers = (self._peers[address] for address in self._homes[session_id])
                if all(other.sessions[session_id].probe is None for other in peers):
                    self._endpoint.emit(OutgoingCaughtUp(session_id))

    def _send_blocks(self, peer: _Peer, session: OutgoingSession, reading: Reading, *, inline: bool) -> None:
        offer = peer.offers.offer(session, reading, inline=inline)
        if inline and reading.host is not None:
            peer.channel.send(offer, reading.host.runs, reading.release)
        else:
            reading.release()
            peer.channel.send(offer)
        self._counters.fragments_sent += len(reading.batch)

    def _acknowledge(self, peer: _Peer, session_id: bytes, epoch: int) -> None:
        if self._owns(peer, session_id, epoch) and peer.sessions[session_id].tail is not None:
            self._remove(peer, session_id)
            self._homes[session_id].remove(self._address_of(peer))
            if not self._homes[session_id]:
                self._done(session_id)

    def _done(self, session_id: bytes) -> None:
        del self._homes[session_id]
        self._counters.outgoing_done += 1
        self._endpoint.emit(OutgoingDone(session_id))

    def _fail(self, session_id: bytes, reason: str, cause: TransferCause, knows: _Peer | None = None) -> None:
        """End the session at all its peers; all but the one that `knows` are told."""
        for address in self._homes.pop(session_id):
            peer = self._peers[address]
            session = peer.sessions[session_id]
            self._remove(peer, session_id)
            if peer is not knows and session.opened:
                peer.channel.send(Abandon(session_id, session.grant.epoch, reason))
        self._lose(session_id, reason, cause)

    def _remove(self, peer: _Peer, session_id: bytes) -> None:
        if peer.lane is None:  # else offers must go out, as their frames do, which no longer read any block
            peer.channel.scrub(session_id)
        peer.ready.pop(session_id, None)
        reading = peer.sessions.pop(session_id).reading
        if reading is not None:
            reading.release()

    def _lose(self, session_id: bytes, reason: str, cause: TransferCause) -> None:
        self._counters.outgoing_failed += 1
        self._endpoint.emit(OutgoingFailed(session_id, reason, cause))
