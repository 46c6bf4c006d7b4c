"""Two connections joined by a socket pair: frames and payload arrive, whatever the pieces; anything else ends it."""

from __future__ import annotations

import select
import socket
from dataclasses import dataclass, field

import numpy as np
import pytest

from penstock.workers.errors import WireError
from penstock.workers.transfer.connection import Connection, ConnectionTerms
from penstock.workers.transfer.frames import FrameSeal, preface
from penstock.workers.transfer.messages import OFFER_DTYPE, Finish, Offer, Ping, Pong

BLOCK = 100_000


@dataclass
class Sink:
    """A landing for whole offers."""

    data: np.ndarray
    open: bool = True

    def views(self):
        return [memoryview(row) for row in self.data]


@dataclass(eq=False)
class Recorder:
    """A handler that writes down what it is told."""

    log: list = field(default_factory=list)
    sink: Sink | None = None
    refuse: bool = False

    def on_opened(self, channel):
        self.log.append("opened")

    def on_message(self, channel, message):
        if self.refuse:
            raise WireError("not this one")
        self.log.append(message)

    def on_payload(self, channel, offer, size):
        if size != len(offer.entries) * BLOCK:
            raise WireError(f"payload of {size} bytes")
        self.log.append("payload")
        return self.sink

    def on_landed(self, channel, landing):
        self.log.append("landed")

    def on_closed(self, channel, reason):
        self.log.append(reason)


class Ends:
    """`left` opened the connection, `right` accepted it."""

    def __init__(self, keys=(b"k", b"k")) -> None:
        self.caught_up = 0
        self.drained: list[Connection] = []
        self.recorders = Recorder(), Recorder()
        sockets = socket.socketpair()
        for sock in sockets:
            sock.setblocking(False)
        self.left, self.right = (
            Connection(
                sock,
                recorder,
                ConnectionTerms(key, 8 << 20, lambda c: None, self.drained.append, self.catch_up),
                connector=connector,
            )
            for sock, recorder, key, connector in zip(sockets, self.recorders, keys, (True, False), strict=True)
        )

    def catch_up(self) -> None:
        self.caught_up += 1

    def run(self, rounds: int = 200) -> None:
        for _ in range(rounds):
            for end in (self.left, self.right):
                if end.failure is None and end.wants_write and select.select([], [end.socket], [], 0)[1]:
                    end.on_writable()
                if end.failure is None and select.select([end.socket], [], [], 0)[0]:
                    end.on_readable()

    def close(self) -> None:
        self.left.socket.close()
        self.right.socket.close()


@pytest.fixture
def make_ends():
    made = []

    def make(*args):
        made.append(Ends(*args))
        return made[-1]

    yield make
    for ends in made:
        ends.close()


def offer(blocks: int) -> Offer:
    return Offer(b"s" * 16, 1, True, np.zeros(blocks, OFFER_DTYPE))


def test_messages_both_ways(make_ends):
    ends = make_ends()
    ends.left.send(Ping())
    ends.left.send(Finish(b"s" * 16, 2, (1, 2)))
    ends.run()
    ends.right.send(Pong())
    ends.run()
    assert ends.recorders[1].log == ["opened", Ping(), Finish(b"s" * 16, 2, (1, 2))]
    assert ends.recorders[0].log == ["opened", Pong()]
    assert ends.caught_up == 3


@pytest.mark.parametrize("blocks", [1, 7])
def test_payload_lands(make_ends, blocks):
    ends = make_ends()
    content = np.random.default_rng(1).integers(0, 256, (blocks, BLOCK), np.uint8)
    ends.recorders[1].sink = Sink(np.zeros_like(content))
    ends.left.send(offer(blocks), [memoryview(row) for row in content])
    ends.left.send(Ping())
    ends.run()
    assert ends.recorders[1].log[1:] == ["payload", "landed", Ping()]
    assert np.array_equal(ends.recorders[1].sink.data, content)


def test_a_landing_that_closes_midway_is_written_no_more(make_ends):
    ends = make_ends()
    content = np.full((20, BLOCK), 9, np.uint8)
    sink = ends.recorders[1].sink = Sink(np.zeros_like(content))
    ends.left.send(offer(20), [memoryview(row) for row in content])
    ends.left.send(Ping())
    ends.run(3)
    assert ends.recorders[1].log[-1] == "payload"
    sink.open = False
    written = sink.data.copy()
    assert 0 < written.sum() < content.sum()
    ends.run()
    assert np.array_equal(sink.data, written)
    assert ends.recorders[1].log[1:] == ["payload", "landed", Ping()]


def test_other_keys_end_it(make_ends):
    ends = make_ends((b"k", b"another"))
    ends.left.send(Ping())
    ends.run()
    assert ends.recorders[1].log == ["opened"]
    assert "not authentic" in (ends.right.failure or "")


def test_a_handlers_refusal_ends_it(make_ends):
    ends = make_ends()
    ends.recorders[1].refuse = True
    ends.left.send(Ping())
    ends.run()
    assert ends.right.failure == "not this one"


@pytest.mark.parametrize("data", [b"x" * 24, preface(b"n" * 16) + b"x" * 80, b""])
def test_strangers(make_ends, data):
    ends = make_ends()
    ends.left.socket.send(data)
    ends.left.socket.shutdown(socket.SHUT_WR)
    for _ in range(5):
        if ends.right.failure is None:
            ends.right.on_readable()
    assert ends.right.failure
    assert ends.recorders[1].log in ([], ["opened"])


@pytest.mark.parametrize(("message", "size"), [(offer(2), BLOCK), (Ping(), 5)])
def test_payload_of_the_wrong_size(make_ends, message, size):
    ends = make_ends()
    ends.run()
    ends.left._writer.queue(message, [memoryview(bytes(size))])
    ends.left.flush()
    ends.run()
    assert "payload" in (ends.right.failure or "")
    assert ends.recorders[1].log == ["opened"]


def test_after_failure_nothing_is_sent(make_ends):
    ends = make_ends()
    ends.run()
    ends.left.fail("enough")
    ends.left.fail("a later reason")
    ends.left.send(Ping())
    assert ends.left.failure == "enough"
    assert ends.left.backlog == 0
    ends.run()
    assert ends.recorders[1].log == ["opened"]


def test_a_peer_that_does_not_read_is_left(make_ends, monkeypatch):
    monkeypatch.setattr("penstock.workers.transfer.connection.MAX_QUEUED_FRAMES", 3)
    ends = make_ends()
    ends.run()
    ends.left.send(offer(20), [memoryview(bytes(BLOCK))] * 20)
    assert ends.left.wants_write
    for _ in range(4):
        assert ends.left.failure is None
        ends.left.send(Ping())
    assert ends.left.failure == "the peer does not read"


def test_room_in_the_socket_is_told(make_ends):
    ends = make_ends()
    ends.run()
    ends.drained.clear()
    ends.recorders[1].sink = Sink(np.zeros((20, BLOCK), np.uint8))
    ends.left.send(offer(20), [memoryview(bytes(BLOCK))] * 20)
    ends.run()
    assert ends.left in ends.drained
    assert not ends.left.wants_write


def test_a_header_over_the_limit_allocates_nothing(make_ends):
    ends = make_ends()
    ends.run()
    seal = ends.left._writer.seal
    assert isinstance(seal, FrameSeal)
    ends.left.socket.send(seal.seal(Ping(), (8 << 20) + 1))
    ends.run()
    assert "over the limit" in (ends.right.failure or "")
