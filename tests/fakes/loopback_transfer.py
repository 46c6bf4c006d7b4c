"""A transfer port for tests without sockets: blocks are copied from pool to pool inside one process, when told to.

Two or more of them share a `LoopbackFabric`; `pump` moves everything that was offered. Nothing moves by itself, so a
test can stop the world at any point, lose a session, or let a sender vanish.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from penstock.workers.kv.storage import KVStorage
from penstock.workers.protocol import Grant
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


@dataclass
class Outgoing:
    grant: Grant
    fragments: list[tuple[int, int]] = field(default_factory=list)
    tail: Tail | None = None
    probed: bool = False


class LoopbackFabric:
    """The ports by address."""

    def __init__(self) -> None:
        self.ports: dict[str, LoopbackTransfer] = {}

    def pump(self) -> None:
        """Copy what was offered and end what is whole."""
        for port in self.ports.values():
            port.push()

    def lose(self, address: str, session_id: bytes) -> None:
        """An incoming session fails there, where that worker still lives."""
        if address in self.ports:
            self.ports[address].lose(session_id)


class LoopbackTransfer:
    def __init__(self, fabric: LoopbackFabric, name: str, storage: KVStorage) -> None:
        self._fabric = fabric
        self._address = f"{name}:0"
        self._storage = storage
        self.incoming: dict[bytes, Incoming] = {}
        self.outgoing: dict[bytes, Outgoing] = {}
        self._events: list[TransferEvent] = []
        fabric.ports[self._address] = self

    @property
    def address(self) -> str:
        return self._address

    def expect(self, session: Incoming) -> None:
        assert session.session_id not in self.incoming
        generations = self._storage.generations[list(session.blocks)].tolist()
        assert tuple(generations) == session.generations
        self.incoming[session.session_id] = session

    def forget(self, session_id: bytes) -> None:
        if self.incoming.pop(session_id, None) is not None:
            self._events.append(IncomingClosed(session_id))

    def start(self, grant: Grant, bank: int = 0) -> None:
        assert grant.session_id not in self.outgoing
        self.outgoing[grant.session_id] = Outgoing(grant)

    def offer(self, session_id: bytes, fragments: Sequence[tuple[int, int]]) -> None:
        if session_id in self.outgoing:
            self.outgoing[session_id].fragments.extend(fragments)

    def probe(self, session_id: bytes) -> None:
        if session_id in self.outgoing:
            self.outgoing[session_id].probed = True

    def finish(self, session_id: bytes, tail: Tail) -> None:
        if session_id in self.outgoing:
            self.outgoing[session_id].tail = tail

    def abandon(self, session_id: bytes, reason: str) -> None:
        sending = self.outgoing.pop(session_id, None)
        if sending is not None:
            self._events.append(OutgoingFailed(session_id, reason))
            self._fabric.lose(sending.grant.address, session_id)

    def poll(self) -> list[TransferEvent]:
        events, self._events = self._events, []
        return events

    def lose(self, session_id: bytes) -> None:
        """An incoming session fails."""
        if self.incoming.pop(session_id, None) is not None:
            self._events.append(IncomingFailed(session_id, "lost"))

    def push(self) -> None:
        for session_id, sending in list(self.outgoing.items()):
            peer = self._fabric.ports.get(sending.grant.address)
            if peer is None or session_id not in peer.incoming:
                del self.outgoing[session_id]
                self._events.append(OutgoingFailed(session_id, "refused"))
            elif sending.tail is None:
                if sending.probed:
                    sending.probed = False
                    self._events.append(OutgoingCaughtUp(session_id))
            else:
                peer.land(session_id, self._storage, sending)
                del self.outgoing[session_id]
                self._events.append(OutgoingDone(session_id))

    def land(self, session_id: bytes, source: KVStorage, sending: Outgoing) -> None:
        session = self.incoming.pop(session_id)
        assert sending.tail is not None
        due = len(session.blocks) if sending.tail.fragments is None else sending.tail.fragments
        assert sorted(index for index, _ in sending.fragments) == list(range(due))
        for index, block in sending.fragments:
            self._storage.data[session.blocks[index]] = source.data[block]
        self._events.append(Arrived(session_id, sending.tail))
