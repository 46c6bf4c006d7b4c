"""KV over TLS: whole engines over real sockets, strangers of every kind, and a thread that rests meanwhile."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from fakes.certificates import Authority
from fakes.transfer_pair import Worker, make_session

from penstock.workers.settings import TransferSettings
from penstock.workers.tls import PeerTls, open_peer_tls
from penstock.workers.transfer.port import Arrived, OutgoingDone, OutgoingFailed, Tail

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def tls(tmp_path: Path) -> PeerTls:
    found = open_peer_tls(Authority(tmp_path).settings())
    assert found is not None
    return found


def hand_over(p: Worker, d: Worker, targets, sources, address: str = "") -> bytes:
    granted, grant = make_session(d.storage, targets, address or d.engine.address, 10.0)
    d.engine.expect(granted)
    p.engine.start(grant)
    p.engine.offer(grant.session_id, list(enumerate(sources)))
    p.engine.finish(grant.session_id, Tail((7, 8)))
    return grant.session_id


@pytest.mark.parametrize("block_bytes", [64, 700_001])
@pytest.mark.parametrize("buffer_bytes", [0, 1 << 16])
def test_blocks_arrive_both_ways(make_worker, tls, block_bytes, buffer_bytes):
    """Small blocks leave many frames in one record; large ones span hundreds, through buffers that are soon full."""
    settings = TransferSettings(transport="tcp", socket_buffer_bytes=buffer_bytes)
    a, b = (make_worker(name, settings=settings, block_bytes=block_bytes, tls=tls) for name in "ab")
    wanted = [a.storage.data[:16].copy(), b.storage.data[:16].copy()]
    for number in range(8):
        hand_over(a, b, (16 + 2 * number, 17 + 2 * number), (2 * number, 2 * number + 1))
        hand_over(b, a, (16 + 2 * number, 17 + 2 * number), (2 * number, 2 * number + 1))
    for worker in (a, b):
        assert {type(event) for event in worker.wait(16)} == {Arrived, OutgoingDone}
    assert np.array_equal(b.storage.data[16:32], wanted[0])
    assert np.array_equal(a.storage.data[16:32], wanted[1])


def test_nothing_of_the_blocks_is_readable_on_the_way(make_worker, tls):
    """A relay between the two sees the bytes of every block where they go in the clear, and of none over TLS."""
    seen = {encrypted: _overheard(make_worker, encrypted) for encrypted in (None, tls)}
    assert (seen[None], seen[tls]) == (True, False)


def _overheard(make_worker, encrypted: PeerTls | None) -> bool:
    p, d = (make_worker(name, transport="tcp", block_bytes=4096, tls=encrypted, host_id=name) for name in "pd")
    p.storage.data[3] = np.frombuffer(b"the prompt of a tenant" * 200, np.uint8)[:4096]
    heard = bytearray()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        relay = threading.Thread(target=_relay, args=(listener, d.engine.address, heard))
        relay.start()
        hand_over(p, d, (5,), (3,), f"127.0.0.1:{listener.getsockname()[1]}")
        assert isinstance(d.wait(1)[0], Arrived)
        assert isinstance(p.wait(1)[0], OutgoingDone)
        p.engine.stop()
        relay.join()
    return b"the prompt of a tenant" in heard


def _relay(listener: socket.socket, address: str, heard: bytearray) -> None:
    here, _ = listener.accept()
    host, _, port = address.rpartition(":")
    there = socket.create_connection((host, int(port)))

    def pass_on(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                heard.extend(data)
                target.sendall(data)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_RDWR)

    with here, there:
        back = threading.Thread(target=pass_on, args=(there, here))
        back.start()
        pass_on(here, there)
        back.join()


@pytest.mark.parametrize("stranger", ["plain", "foreign"])
def test_strangers_are_refused_and_the_session_fails_with_one_event(make_worker, tls, tmp_path, stranger):
    other = None if stranger == "plain" else open_peer_tls(Authority(tmp_path, "foreign").settings())
    p, d = make_worker("p", transport="tcp", tls=other), make_worker("d", transport="tcp", tls=tls)
    session = hand_over(p, d, (1,), (2,))
    (event,) = p.wait(1)
    assert isinstance(event, OutgoingFailed)
    assert event.session_id == session
    assert not d.engine.poll()
    friend = make_worker("f", transport="tcp", tls=tls)
    hand_over(friend, d, (3,), (4,))
    assert isinstance(friend.wait(1)[0], OutgoingDone)


def test_a_peer_that_never_answers_the_handshake_costs_no_processor(make_worker, tls):
    worker = make_worker("w", transport="tcp", tls=tls)
    host, _, port = worker.engine.address.rpartition(":")
    with socket.create_connection((host, int(port))), socket.create_server(("127.0.0.1", 0)) as silent:
        granted, grant = make_session(worker.storage, (1,), f"127.0.0.1:{silent.getsockname()[1]}", 10.0)
        worker.engine.start(grant)
        time.sleep(0.2)
        begun = time.process_time()
        time.sleep(0.5)
        assert time.process_time() - begun < 0.2
        assert granted.session_id == grant.session_id
