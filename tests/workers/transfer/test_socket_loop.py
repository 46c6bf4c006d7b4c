"""The loop wakes, accepts, connects, and closes each connection with one word to its handler."""

from __future__ import annotations

import errno
import socket
import time

import pytest

from penstock.workers.errors import ConfigError
from penstock.workers.transfer import socket_loop
from penstock.workers.transfer.connection import ConnectionTerms
from penstock.workers.transfer.messages import Ping
from penstock.workers.transfer.socket_loop import SocketLoop


class Recorder:
    """A handler that writes down what it is told; `fragile` handlers raise."""

    def __init__(self, *, fragile: bool = False) -> None:
        self.log: list[object] = []
        self.channels: list[object] = []
        self.fragile = fragile

    def on_opened(self, channel):
        self.log.append("opened")
        self.channels.append(channel)

    def on_message(self, channel, message):
        if self.fragile:
            raise KeyError("a defect")
        self.log.append(message)

    def on_closed(self, channel, reason):
        self.log.append(reason)


@pytest.fixture
def make_loop():
    made = []

    def make(host="127.0.0.1", **options):
        recorder = Recorder(**options)
        loop = SocketLoop(
            host,
            0,
            recorder,
            lambda owner: ConnectionTerms(b"k", 1 << 20, owner.attend, lambda c: None, lambda: None),
        )
        made.append(loop)
        return loop, recorder

    yield make
    for loop in made:
        loop.close("end of test")


def turn(*loops, rounds=20):
    for _ in range(rounds):
        for loop in loops:
            loop.serve(loop.wait(0.002))


def test_wake(make_loop):
    loop, _ = make_loop()
    loop.wake()
    loop.wake()
    begun = time.monotonic()
    assert loop.wait(5.0)
    assert time.monotonic() - begun < 1.0
    assert not loop.wait(0.0)


def test_connect_talk_and_part(make_loop):
    (a, mine), (b, theirs) = make_loop(), make_loop()
    caller = Recorder()
    connection = a.connect(b.address, caller)
    turn(a, b)
    connection.send(Ping())
    turn(a, b)
    assert theirs.log == ["opened", Ping()]
    connection.fail("done here")
    turn(a, b)
    assert caller.log == ["opened", "done here"]
    assert theirs.log[2:] == ["the peer closed the connection"]
    assert mine.log == []


def test_a_defect_in_one_handler_ends_that_connection_only(make_loop, caplog):
    (a, _), (b, theirs) = make_loop(), make_loop(fragile=True)
    first, second = Recorder(), Recorder()
    broken, sound = a.connect(b.address, first), a.connect(b.address, second)
    turn(a, b)
    broken.send(Ping())
    turn(a, b)
    assert theirs.log == ["opened", "opened", "internal error"]
    assert "a defect" in caplog.text
    assert sound.failure is None
    assert first.log[1:] == ["the peer closed the connection"]


def test_nobody_listens(make_loop):
    loop, _ = make_loop()
    caller = Recorder()
    with socket.create_server(("127.0.0.1", 0)) as gone:
        address = f"127.0.0.1:{gone.getsockname()[1]}"
    loop.connect(address, caller)
    turn(loop)
    (reason,) = caller.log
    assert "refused" in reason
    for wrong in ("localhost:80", "127.0.0.1", "127.0.0.1:x", "127.0.0.1:70000"):
        with pytest.raises(ValueError):
            loop.connect(wrong, caller)


def test_the_number_of_connections_is_bounded(make_loop, monkeypatch):
    loop, _ = make_loop()
    monkeypatch.setattr(socket_loop, "MAX_CONNECTIONS", 3)
    host, port = loop.address.split(":")
    callers = [socket.create_connection((host, int(port))) for _ in range(6)]
    turn(loop)
    assert len(loop._connections) <= 3
    for caller in callers:
        caller.close()
    turn(loop)
    assert not loop._connections


def test_out_of_descriptors_is_said_and_survived(make_loop, monkeypatch, caplog):
    loop, _ = make_loop()

    class Exhausted:
        def accept(self):
            raise OSError(errno.EMFILE, "too many open files")

    listener, loop._listener = loop._listener, Exhausted()
    assert loop._accept() is False
    assert "open files limit" in caplog.text
    loop._listener = listener


def test_ipv6_address_is_bracketed(make_loop):
    try:
        loop, theirs = make_loop("::1")
    except ConfigError:
        pytest.skip("no IPv6 here")
    assert loop.address.startswith("[::1]:")
    loop.connect(loop.address, Recorder())
    turn(loop)
    assert theirs.log == ["opened"]


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1"])
def test_hosts_that_cannot_be(make_loop, host):
    with pytest.raises(ConfigError) as caught:
        make_loop(host)
    assert caught.value.key == "transfer.host"
