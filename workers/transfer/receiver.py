"""The receiving half: sessions this worker granted, the peers that fill them, and the blocks' bytes on arrival.

Runs on the transfer thread, called by `engine.py` (commands, sweep) and `connection.py` (messages, payload). Does no
I/O of its own but the copy out of a peer's shared segment, so tests drive it through hostile channels.

One block lands like this: its session is known, open, bound to this connection and of the right epoch; the target
block still has the generation that was granted; the bytes are written; over shared memory the peer's generation is
compared before and after the copy; the digest is compared; only then does the fragment count. A session ends with its
removal from `_sessions`; from then on every frame for it is rejected and its payload read away.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from penstock.workers import fault_points
from penstock.workers.errors import WireError
from penstock.workers.fault_points import Point, Verdict
from penstock.workers.totals import TransferCause
from penstock.workers.transfer.connection import Landing
from penstock.workers.transfer.digests import block_digest
from penstock.workers.transfer.endpoint import Channel, Endpoint
from penstock.workers.transfer.incoming import Delivery, IncomingSession, SessionError
from penstock.workers.transfer.landing import BlockLanding, Entry, Verify, attach_segment, copy_blocks
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
from penstock.workers.transfer.port import (
    Arrived,
    BlockMover,
    DirectPeerPool,
    HostPeerPool,
    Incoming,
    IncomingClosed,
    IncomingFailed,
    Tail,
)

if TYPE_CHECKING:  # torch, which a worker without a device does without
    from torch import Tensor

    from penstock.workers.transfer.lane_frames import LaneReceiver

HANDSHAKE_TIMEOUT_S = 5.0


@dataclass(slots=True)
class _Peer:
    """An accepted connection; `segment` is the peer's storage where it shares memory, `pool` ours as it sees it."""

    since: float
    pool: BlockMover
    scratch: memoryview = field(default_factory=lambda: memoryview(b""))  # a block that nobody needs
    hello: Hello | None = None
    segment: HostPeerPool | DirectPeerPool | None = None
    lane: LaneReceiver | None = None  # on which its blocks come, where they travel by NCCL


class Receiver:
    """All incoming sessions and the connections that carry them."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._counters = endpoint.counters
        self._sessions: dict[bytes, IncomingSession] = {}
        self._peers: dict[Channel, _Peer] = {}
        self._landings: dict[Channel, BlockLanding] = {}  # payload that is being read
        self._waiting: dict[Channel, None] = {}  # whose payload there was no room for

    # --- the engine's side ----------------------------------------------------------------------------------------

    def expect(self, granted: Incoming) -> None:
        """Accept a session; its lease starts now."""
        self._counters.incoming_started += 1
        own = self._endpoint.share.heads
        self._sessions[granted.session_id] = IncomingSession(granted, self._endpoint.clock(), own)

    def forget(self, session_id: bytes) -> None:
        """End a session without a verdict."""
        session = self._sessions.get(session_id)
        if session is not None:
            self._end(session)
            self._counters.incoming_closed += 1
            self._endpoint.emit(IncomingClosed(session_id))
            self._tell(session, "cancelled by the receiver")

    def fail_all(self, reason: str) -> None:
        """End every session: this side goes away."""
        for session in list(self._sessions.values()):
            self._fail(session, reason, TransferCause.STOPPED)

    def sweep(self, now: float) -> float | None:
        """End sessions whose lease is over and peers that never said hello. Returns the shortest lease in seconds."""
        for session in list(self._sessions.values()):
            if now >= session.expires:
                reason = f"no sign of the sender for {session.granted.lease_s:g} s"
                self._fail(session, reason, TransferCause.LEASE_EXPIRED)
        for channel, peer in list(self._peers.items()):
            if peer.hello is None and now - peer.since > HANDSHAKE_TIMEOUT_S:
                channel.fail("no hello from the peer")
        leases = [session.granted.lease_s for session in self._sessions.values()]
        if any(peer.hello is None for peer in self._peers.values()):
            leases.append(HANDSHAKE_TIMEOUT_S)
        return min(leases, default=None)

    # --- the connections' side ------------------------------------------------------------------------------------

    def on_opened(self, channel: Channel) -> None:
        """The connection is ready for the peer's Hello."""
        self._peers[channel] = _Peer(self._endpoint.clock(), self._endpoint.storage)

    def on_closed(self, channel: Channel, reason: str) -> None:
        """The peer is gone and its unfinished sessions with it."""
        peer = self._peers.pop(channel, None)
        self._waiting.pop(channel, None)
        for session in list(self._sessions.values()):
            if channel in session.channels:
                self._fail(session, f"sender lost: {reason}", TransferCause.PEER_LOST)
        self._landings.pop(channel, None)  # released with its session
        if peer is not None and peer.segment is not None:
            peer.segment.close()
        if peer is not None and peer.lane is not None:
            peer.lane.close()

    def on_message(self, channel: Channel, message: Message) -> None:
        """Act on one message. Raises WireError for one that has no place here."""
        peer = self._peers[channel]
        if isinstance(message, Hello) and peer.hello is None:
            self._welcome(channel, peer, message)
            return
        if peer.hello is None:
            raise WireError("transfer: the peer did not say hello first")
        match message:
            case Ping():
                self._renew_all(channel)
            case Open(session_id, epoch):
                self._find(channel, session_id, epoch)
            case Offer() if peer.lane is not None:
                peer.lane.take(message, lambda frame: self._land_frame(channel, message, frame))
            case Offer():
                self._fetch(channel, peer, message)
            case Finish() if peer.lane is not None:
                peer.lane.after_frames(lambda: self._finish(channel, message))
            case Finish():
                self._finish(channel, message)
            case Abandon(session_id, epoch, reason):
                delivery = self._find(channel, session_id, epoch)
                if delivery is not None:
                    self._fail(delivery.session, f"given up by the sender: {reason}", TransferCause.ABANDONED)
            case _:
                raise WireError(f"transfer: {type(message).__name__} from a sender")

    def on_payload(self, channel: Channel, offer: Offer, size: int) -> BlockLanding | None:
        """Say where the bytes that follow an inline offer go. None: no room now; the channel will be resumed."""
        peer = self._peers[channel]
        if peer.hello is None:
            raise WireError("transfer: the peer did not say hello first")
        if size != len(offer.entries) * peer.pool.block_bytes:
            raise WireError(f"transfer: payload of {size} bytes for {len(offer.entries)} blocks")
        if fault_points.plan is not None:
            fault_points.plan.reach(Point.TRANSFER_OFFER, self._endpoint.worker_id)
        landing = self._plan(channel, peer, offer)
        if landing is None:
            self._waiting[channel] = None
        else:
            self._landings[channel] = landing
        return landing

    def on_landed(self, channel: Channel, landing: Landing) -> None:
        """The bytes are there."""
        self._landings.pop(channel, None)
        if isinstance(landing, BlockLanding):
            if landing.delivery is not None and landing.open:
                self._settle(landing, landing.delivery)
            self._release(landing)

    # --- inside ---------------------------------------------------------------------------------------------------

    def _welcome(self, channel: Channel, peer: _Peer, hello: Hello) -> None:
        endpoint, own = self._endpoint, self._endpoint.share.heads
        head_bytes = endpoint.storage.block_bytes // own.count
        fits = own.holds(hello.sent) and hello.held.holds(hello.sent)
        if hello.compatibility != endpoint.compatibility or hello.block_bytes != head_bytes * hello.held.count:
            self._refuse(channel, "incompatible: KV layout, model revision or codec differ")
            return
        if not fits:
            self._refuse(channel, f"incompatible: KV heads {hello.sent} are not among the {own} of this rank")
            return
        peer.hello = hello
        peer.pool = endpoint.pool_of(hello.sent)
        peer.scratch = memoryview(bytearray(peer.pool.block_bytes))
        if (endpoint.lanes is not None) != hello.lane:
            self._refuse(channel, "one of the two workers moves blocks by NCCL (transfer.transport), the other not")
            return
        if endpoint.lanes is not None:
            part = endpoint.part_of(hello.sent)
            invitation, peer.lane = endpoint.lanes.invite(
                endpoint.post, lambda reason: channel.fail(f"lane: {reason}"), part
            )
            channel.send(Welcome(False, 0, invitation))
            return
        peer.segment = attach_segment(self._endpoint, hello)
        if peer.segment is None and self._endpoint.settings.transport == "shared_memory":
            self._refuse(channel, "this worker takes blocks over shared memory only, and cannot see the sender's")
            return
        channel.send(Welcome(peer.segment is not None, peer.pool.frame_bytes or 0))

    def _refuse(self, channel: Channel, reason: str) -> None:
        self._counters.connections_refused += 1
        channel.send(Goodbye(reason))
        channel.fail(reason)

    def _find(self, channel: Channel, session_id: bytes, epoch: int) -> Delivery | None:
        """What this connection delivers of a live session, renewed; otherwise the peer is told that it is none."""
        session, hello = self._sessions.get(session_id), self._peers[channel].hello
        found = None
        if session is not None and hello is not None:
            found = session.delivery(channel, epoch, hello.sent, self._endpoint.clock())
        if found is None:
            self._counters.rejected += 1
            channel.send(Reject(session_id, epoch, "unknown session, or it has ended"))
        return found

    def _renew_all(self, channel: Channel) -> None:
        now = self._endpoint.clock()
        for session in self._sessions.values():
            delivery = session.delivered_by(channel)
            if delivery is not None:
                delivery.renew(now)
        channel.send(Pong())

    def _plan(self, channel: Channel, peer: _Peer, offer: Offer) -> BlockLanding | None:
        delivery = self._find(channel, offer.session_id, offer.epoch)
        if delivery is None:
            return BlockLanding(offer, None)
        try:
            targets = delivery.targets(offer, peer.pool.generations)
        except SessionError as error:
            self._counters.generation_failures += 1
            self._fail(delivery.session, str(error), TransferCause.DAMAGED)
            return BlockLanding(offer, delivery)
        blocks = [target for target in targets if target is not None]
        host = peer.pool.land(blocks) if blocks else None
        if blocks and host is None:
            return None
        return BlockLanding(offer, delivery, targets, host, peer.scratch)

    def _fetch(self, channel: Channel, peer: _Peer, offer: Offer) -> None:
        """Copy offered blocks out of the peer's segment."""
        segment, limit = peer.segment, peer.pool.frame_bytes
        if segment is None:
            raise WireError("transfer: blocks offered in shared memory on a TCP connection")
        sources = offer.entries["source_block"]
        if int(sources.max()) >= len(segment.generations):
            raise WireError("transfer: offered block outside the sender's pool")
        if limit is not None and len(sources) * segment.block_bytes > limit:
            raise WireError(f"transfer: {len(sources)} blocks at once are over the limit")
        if fault_points.plan is not None:
            fault_points.plan.reach(Point.TRANSFER_OFFER, self._endpoint.worker_id)
        landing = self._plan(channel, peer, offer)
        # No room for them (all of it lent to other peers): they stay missing, and are asked for again at Finish.
        if landing is None or landing.delivery is None or not landing.open:
            return
        if copy_blocks(landing, segment, self._verify(offer.session_id)):
            if isinstance(segment, DirectPeerPool):
                self._counters.fragments_checked += len(landing.rows)  # by their generations
            self._settle(landing, landing.delivery)
        else:
            self._counters.generation_failures += 1
            self._fail(landing.delivery.session, "the sender has reused an offered block", TransferCause.DAMAGED)
        self._release(landing)

    def _land_frame(self, channel: Channel, offer: Offer, frame: Tensor) -> None:
        """A frame of offered blocks has come over the lane: the session may have ended, and blocks been reused."""
        peer = self._peers.get(channel)
        delivery = None if peer is None else self._find(channel, offer.session_id, offer.epoch)
        if peer is None or peer.lane is None or delivery is None:
            return
        if fault_points.plan is not None:
            fault_points.plan.reach(Point.TRANSFER_OFFER, self._endpoint.worker_id)
        try:
            targets = delivery.targets(offer, self._endpoint.storage.generations)
        except SessionError as error:
            self._counters.generation_failures += 1
            self._fail(delivery.session, str(error), TransferCause.DAMAGED)
            return
        landing = BlockLanding(offer, delivery, targets)
        peer.lane.unpack(landing, frame, self._endpoint.worker_id)
        self._counters.fragments_checked += len(landing.intact)
        self._settle(landing, delivery)

    def _verify(self, session_id: bytes) -> Verify:
        """Whether a block's bytes are those that its entry's digest is of, for blocks of this session."""
        plan, worker_id = fault_points.plan, self._endpoint.worker_id

        def verify(entry: Entry, block: memoryview) -> bool:
            fragment, stride, _, _, _, digest = entry
            self._counters.fragments_checked += 1
            if plan is not None and plan.reach(Point.TRANSFER_LAND, worker_id, fragment) is Verdict.CORRUPT:
                block[plan.byte(len(block))] ^= 0xFF
            return stride == 0 or block_digest(block, stride, session_id, fragment) == digest

        return verify

    def _settle(self, landing: BlockLanding, delivery: Delivery) -> None:
        """Count what has arrived intact; a damaged block stays missing and is asked for again at Finish."""
        counters = self._counters
        if not landing.intact:
            landing.verify_all(self._verify(landing.offer.session_id))
        intact = landing.intact
        if landing.host is not None:
            landing.host.commit([place for place, good in enumerate(intact) if good])
        for (fragment, *_), good in zip(landing.rows, intact, strict=True):
            if good:
                delivery.mark(fragment)
        landed = sum(intact)
        counters.fragments_landed += landed
        counters.bytes_landed += landed * self._peers[delivery.channel].pool.block_bytes
        counters.digest_failures += len(intact) - landed
        delivery.session.mismatches += len(intact) - landed
        counters.duplicates += len(landing.targets) - len(intact)
        self._complete(delivery.session)

    def _release(self, landing: BlockLanding) -> None:
        """Give the landing's memory back, and to who waits for it."""
        landing.release()
        waiting, self._waiting = self._waiting, {}
        for channel in waiting:
            channel.resume()

    def _finish(self, channel: Channel, message: Finish) -> None:
        delivery = self._find(channel, message.session_id, message.epoch)
        if delivery is None:
            return
        session = delivery.session
        try:
            lacking = delivery.finish(message.tokens, message.fragments)
        except SessionError as error:
            self._fail(session, str(error), TransferCause.MISMATCHED if session.mismatches else TransferCause.DAMAGED)
            return
        if lacking:
            self._counters.resends += 1
            channel.send(Missing(session.granted.session_id, session.granted.epoch, lacking))
        self._complete(session)

    def _complete(self, session: IncomingSession) -> None:
        if session.whole and session.open and session.tokens is not None:
            self._end(session)
            self._counters.incoming_arrived += 1
            self._endpoint.emit(Arrived(session.granted.session_id, Tail(session.tokens, session.fragments)))
            self._acknowledge(session)

    def _acknowledge(self, session: IncomingSession) -> None:
        ack = Ack(session.granted.session_id, session.granted.epoch)
        for _ in range(fault_points.times(Point.TRANSFER_ACK, self._endpoint.worker_id)):
            self._send_all(session, ack)

    def _fail(self, session: IncomingSession, reason: str, cause: TransferCause) -> None:
        self._end(session)
        self._counters.incoming_failed += 1
        self._endpoint.emit(IncomingFailed(session.granted.session_id, reason, cause))
        self._tell(session, reason)

    def _end(self, session: IncomingSession) -> None:
        session.open = False
        del self._sessions[session.granted.session_id]
        for landing in list(self._landings.values()):
            if landing.delivery is not None and landing.delivery.session is session:
                self._release(landing)

    def _tell(self, session: IncomingSession, reason: str) -> None:
        """Let the senders free their blocks at once."""
        self._send_all(session, Reject(session.granted.session_id, session.granted.epoch, reason))

    def _send_all(self, session: IncomingSession, message: Message) -> None:
        for channel in session.channels:
            if channel in self._peers:
                channel.send(message)
