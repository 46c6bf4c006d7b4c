"""Both halves of a KV transfer joined by a hostile link, and whole transfer engines with an inbox to wait on."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass, field

import numpy as np
from fakes.hostile_link import HostileLink

from penstock.workers.kv.storage import KVStorage
from penstock.workers.protocol import Grant
from penstock.workers.settings import TransferSettings
from penstock.workers.transfer.endpoint import Endpoint
from penstock.workers.transfer.engine import TransferEngine
from penstock.workers.transfer.host import host_id
from penstock.workers.transfer.port import Incoming, TransferEvent
from penstock.workers.transfer.receiver import Receiver
from penstock.workers.transfer.sender import Sender

BLOCK_BYTES = 256
NUM_BLOCKS = 32
EPOCH = 7


def fill(storage: KVStorage, seed: int) -> None:
    """Content that differs in every block."""
    storage.data[:] = np.random.default_rng(seed).integers(0, 256, storage.data.shape, np.uint8)


@dataclass
class Pair:
    """Sender and receiver joined by a link that the test works by hand, under a clock that it sets."""

    transport: str = "tcp"
    digest: str = "full"
    now: float = 0.0
    sent: list[TransferEvent] = field(default_factory=list)
    received: list[TransferEvent] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.source = KVStorage.create(NUM_BLOCKS, BLOCK_BYTES)
        self.target = KVStorage.create(NUM_BLOCKS, BLOCK_BYTES)
        fill(self.source, 1)
        self.link = HostileLink()
        settings = TransferSettings(transport=self.transport, digest=self.digest)
        ends = [
            Endpoint(settings, storage, name, "here", "same", events.append, lambda: self.now)
            for storage, name, events in (
                (self.source, "p", self.sent),
                (self.target, "d", self.received),
            )
        ]
        self.sender = self.link.sender = Sender(ends[0], self.link.connect)
        self.receiver = self.link.receiver = Receiver(ends[1])

    def begin(self, blocks: tuple[int, ...], lease_s: float = 10.0) -> Grant:
        """Expect and start one session into these target blocks; the first call also shakes hands."""
        granted, grant = make_session(self.target, blocks, "127.0.0.1:1", lease_s)
        self.receiver.expect(granted)
        first = not self.link.receiver_end.outbox and not self.receiver._peers
        self.sender.start(grant)
        if first:
            self.link.handshake()
        return grant

    def close(self) -> None:
        for channel in list(self.receiver._peers):
            self.receiver.on_closed(channel, "end of test")
        self.source.close()
        self.target.close()


def make_session(
    target: KVStorage, blocks: tuple[int, ...], address: str, lease_s: float = 10.0, compatibility: str = "same"
) -> tuple[Incoming, Grant]:
    """The two views of one fresh session."""
    session_id = os.urandom(16)
    generations = tuple(int(target.generations[block]) for block in blocks)
    granted = Incoming(session_id, EPOCH, blocks, generations, lease_s)
    return granted, Grant(session_id, "d", EPOCH, address, "here", 0, blocks, generations, lease_s, compatibility)


class Worker:
    """A transfer engine with its storage and an inbox that tests can wait on."""

    def __init__(self, name: str, storage: KVStorage, settings: TransferSettings, **options: object) -> None:
        self.storage = storage
        self._arrived = threading.Event()
        self.events: list[TransferEvent] = []
        given = {"host_id": host_id(), "compatibility": "same", "cluster_key": "5a" * 32, **options}
        self.engine = TransferEngine(
            settings, storage, worker_id=name, epoch=EPOCH, wake=self._arrived.set, clock=time.monotonic, **given
        )

    def wait(self, count: int, timeout_s: float = 10.0) -> list[TransferEvent]:
        """The first `count` events; fails when they do not come."""
        until = time.monotonic() + timeout_s
        while len(self.events) < count:
            self._arrived.wait(max(0.0, until - time.monotonic()))
            self._arrived.clear()
            self.events += self.engine.poll()
            if time.monotonic() > until:
                raise AssertionError(f"{count} events wanted, got {self.events}")
        return self.events[:count]

    def close(self) -> None:
        self.engine.stop()
        self.storage.close()
