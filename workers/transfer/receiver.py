"""The receiving half: sessions this worker granted, the peers that fill them, and the blocks' bytes on arrival.

Runs on the transfer thread, called by `engine.py` (commands, sweep) and `connection.py` (messages, payload). Does no
I/O of its own but the copy out of a peer's shared segment, so tests drive it through hostile channels.

One block lands like this: its session is known, open, bound to this connection and of the right epoch; the target
block still has the generation that was granted; the bytes are written; over shared memory the peer's generation is
compared before and after the copy; the digest is compared; only then does the fragment count. A session ends with its
removal from `_sessions`; from then on every frame for it is rejected and its payload read away.
"""

from __future__ import annotations

from dataclasses import dataclass

from penstock.workers.errors import WireError
from penstock.workers.totals import TransferCause
from penstock.workers.transfer.connection import Landing
from penstock.workers.transfer.digests import block_digest
from penstock.workers.transfer.endpoint import Channel, Endpoint
from penstock.workers.transfer.incoming import IncomingSession, SessionError
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
    DirectPeerPool,
    HostPeerPool,
    Incoming,
    IncomingClosed,
    IncomingFailed,
    Tail,
)

HANDSHAKE_TIMEOUT_S = 5.0


@dataclass(slots=True)
class _Peer:
    """An accepted connection; `segment` is the peer's storage where it shares memory."""

    since: float
    hello: Hello | None = None
    segment: HostPeerPool | DirectPeerPool | None = None


class Receiver:
    """All incoming sessions and the connections that carry them."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._counters = endpoint.counters
        self._sessions: dict[bytes, IncomingSession] = {}
        self._peers: dict[Channel, _Peer] = {}
        self._landings: dict[Channel, BlockLanding] = {}  # payload that is being read
        self._waiting: dict[Channel, None] = {}  # whose payload there was no room for
        self._scratch = memoryview(bytearray(endpoint.storage.block_bytes))

    # --- the engine's side ----------------------------------------------------------------------------------------

    def expect(self, granted: Incoming) -> None:
        """Accept a session; its lease starts now."""
        self._counters.incoming_started += 1
        self._sessions[granted.session_id] = IncomingSession(granted, self._endpoint.clock())

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
        self._peers[channel] = _Peer(self._endpoint.clock())

    def on_closed(self, channel: Channel, reason: str) -> None:
        """The peer is gone and its unfinished sessions with it."""
        peer = self._peers.pop(channel, None)
        self._waiting.pop(channel, None)
        for session in list(self._sessions.values()):
            if session.channel is channel:
                self._fail(session, f"sender lost: {reason}", TransferCause.PEER_LOST)
        self._landings.pop(channel, None)  # released with its session
        if peer is not None and peer.segment is not None:
            peer.segment.close()

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
            case Offer():
                self._fetch(channel, peer, message)
            case Finish(session_id, epoch, tokens):
                self._finish(channel, self._find(channel, session_id, epoch), tokens)
            case Abandon(session_id, epoch, reason):
                session = self._find(channel, session_id, epoch)
                if session is not None:
                    self._fail(session, f"given up by the sender: {reason}", TransferCause.ABANDONED)
            case _:
                raise WireError(f"transfer: {type(message).__name__} from a sender")

    def on_payload(self, channel: Channel, offer: Offer) -> BlockLanding | None:
        """Say where the bytes that follow an inline offer go. None: no room now; the channel will be resumed."""
        if self._peers[channel].hello is None:
            raise WireError("transfer: the peer did not say hello first")
        landing = self._plan(channel, offer)
        if landing is None:
            self._waiting[channel] = None
        else:
            self._landings[channel] = landing
        return landing

    def on_landed(self, channel: Channel, landing: Landing) -> None:
        """The bytes are there."""
        self._landings.pop(channel, None)
        if isinstance(landing, BlockLanding):
            if landing.session is not None and landing.open:
                self._settle(landing, landing.session)
            self._release(landing)

    # --- inside ---------------------------------------------------------------------------------------------------

    def _welcome(self, channel: Channel, peer: _Peer, hello: Hello) -> None:
        storage, ours = self._endpoint.storage, self._endpoint.compatibility
        if hello.compatibility != ours or hello.block_bytes != storage.block_bytes:
            self._counters.connections_refused += 1
            channel.send(Goodbye("incompatible: KV layout, model revision or codec differ"))
            channel.fail("incompatible peer")
            return
        peer.hello = hello
        peer.segment = attach_segment(self._endpoint, hello)
        if peer.segment is None and self._endpoint.settings.transport == "shared_memory":
            self._counters.connections_refused += 1
            channel.send(Goodbye("this worker takes blocks over shared memory only, and cannot see the sender's"))
            channel.fail("no shared memory with the peer")
            return
        channel.send(Welcome(peer.segment is not None, storage.frame_bytes or 0))

    def _find(self, channel: Channel, session_id: bytes, epoch: int) -> IncomingSession | None:
        """The live session this connection may change, renewed; otherwise the peer is told that it is none."""
        session = self._sessions.get(session_id)
        if session is None or not session.bind(channel, epoch):
            self._counters.rejected += 1
            channel.send(Reject(session_id, epoch, "unknown session, or it has ended"))
            return None
        session.renew(self._endpoint.clock())
        return session

    def _renew_all(self, channel: Channel) -> None:
        now = self._endpoint.clock()
        for session in self._sessions.values():
            if session.channel is channel:
                session.renew(now)
        channel.send(Pong())

    def _plan(self, channel: Channel, offer: Offer) -> BlockLanding | None:
        session = self._find(channel, offer.session_id, offer.epoch)
        if session is None:
            return BlockLanding(offer, None)
        storage = self._endpoint.storage
        try:
            targets = session.targets(offer, storage.generations)
        except SessionError as error:
            self._counters.generation_failures += 1
            self._fail(session, str(error), TransferCause.DAMAGED)
            return BlockLanding(offer, session)
        blocks = [target for target in targets if target is not None]
        host = storage.land(blocks) if blocks else None
        if blocks and host is None:
            return None
        return BlockLanding(offer, session, targets, host, self._scratch)

    def _fetch(self, channel: Channel, peer: _Peer, offer: Offer) -> None:
        """Copy offered blocks out of the peer's segment."""
        segment, limit = peer.segment, self._endpoint.storage.frame_bytes
        if segment is None:
            raise WireError("transfer: blocks offered in shared memory on a TCP connection")
        sources = offer.entries["source_block"]
        if int(sources.max()) >= len(segment.generations):
            raise WireError("transfer: offered block outside the sender's pool")
        if limit is not None and len(sources) * segment.block_bytes > limit:
            raise WireError(f"transfer: {len(sources)} blocks at once are over the limit")
        if self._endpoint.faults is not None:
            self._endpoint.faults.stall(self._endpoint.faults.delay_landing_s)
        landing = self._plan(channel, offer)
        # No room for them (all of it lent to other peers): they stay missing, and are asked for again at Finish.
        if landing is None or landing.session is None or not landing.open:
            return
        if copy_blocks(landing, segment, self._verify(offer.session_id)):
            self._settle(landing, landing.session)
        else:
            self._counters.generation_failures += 1
            self._fail(landing.session, "the sender has reused an offered block", TransferCause.DAMAGED)
        self._release(landing)

    def _verify(self, session_id: bytes) -> Verify:
        """Whether a block's bytes are those that its entry's digest is of, for blocks of this session."""
        faults = self._endpoint.faults

        def verify(entry: Entry, block: memoryview) -> bool:
            fragment, stride, _, _, _, digest = entry
            if faults is not None and faults.hits("corrupt", fragment):
                block[-1] ^= 0xFF
            return stride == 0 or block_digest(block, stride, session_id, fragment) == digest

        return verify

    def _settle(self, landing: BlockLanding, session: IncomingSession) -> None:
        """Count what has arrived intact; a damaged block stays missing and is asked for again at Finish."""
        counters = self._counters
        if not landing.intact:
            landing.verify_all(self._verify(landing.offer.session_id))
        intact = landing.intact
        if landing.host is not None:
            landing.host.commit([place for place, good in enumerate(intact) if good])
        for (fragment, *_), good in zip(landing.rows, intact, strict=True):
            if good:
                session.mark(fragment)
        landed = sum(intact)
        counters.fragments_landed += landed
        counters.bytes_landed += landed * self._endpoint.storage.block_bytes
        counters.digest_failures += len(intact) - landed
        counters.duplicates += len(landing.targets) - len(intact)
        self._complete(session)

    def _release(self, landing: BlockLanding) -> None:
        """Give the landing's memory back, and to who waits for it."""
        landing.release()
        waiting, self._waiting = self._waiting, {}
        for channel in waiting:
            channel.resume()

    def _finish(self, channel: Channel, session: IncomingSession | None, tokens: tuple[int, ...]) -> None:
        if session is None:
            return
        try:
            lacking = session.finish(tokens)
        except SessionError as error:
            self._fail(session, str(error), TransferCause.DAMAGED)
            return
        if lacking:
            self._counters.resends += 1
            channel.send(Missing(session.granted.session_id, session.granted.epoch, lacking))
        self._complete(session)

    def _complete(self, session: IncomingSession) -> None:
        if session.whole and session.open and session.tokens is not None:
            self._end(session)
            self._counters.incoming_arrived += 1
            self._endpoint.emit(Arrived(session.granted.session_id, Tail(session.tokens)))
            if session.channel is not None and session.channel in self._peers:
                session.channel.send(Ack(session.granted.session_id, session.granted.epoch))

    def _fail(self, session: IncomingSession, reason: str, cause: TransferCause) -> None:
        self._end(session)
        self._counters.incoming_failed += 1
        self._endpoint.emit(IncomingFailed(session.granted.session_id, reason, cause))
        self._tell(session, reason)

    def _end(self, session: IncomingSession) -> None:
        session.open = False
        del self._sessions[session.granted.session_id]
        for landing in list(self._landings.values()):
            if landing.session is session:
                self._release(landing)

    def _tell(self, session: IncomingSession, reason: str) -> None:
        """Let the sender free its blocks at once."""
        if session.channel is not None and session.channel in self._peers:
            session.channel.send(Reject(session.granted.session_id, session.granted.epoch, reason))
