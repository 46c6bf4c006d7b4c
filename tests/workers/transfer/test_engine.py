"""Whole transfer engines over real sockets and shared memory: every fault ends in one event on each side."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from fakes.fault_plan import ALWAYS, Action, Fault, FaultPlan
from fakes.tcp_proxy import TcpProxy
from fakes.transfer_pair import NUM_BLOCKS, Worker, make_session

from penstock.workers.errors import ConfigError
from penstock.workers.fault_points import Point
from penstock.workers.kv.storage import KVStorage
from penstock.workers.settings import TransferSettings
from penstock.workers.totals import TransferCause
from penstock.workers.transfer.engine import TransferEngine
from penstock.workers.transfer.port import Arrived, IncomingClosed, IncomingFailed, OutgoingDone, OutgoingFailed, Tail

pytestmark = pytest.mark.timeout(60)
POINT_OF = {"drop": Point.TRANSFER_SEND, "duplicate": Point.TRANSFER_SEND, "corrupt": Point.TRANSFER_LAND}
TRANSPORTS = ["auto", "tcp"]
TESTS = Path(__file__).parents[2]


def begin(p: Worker, d: Worker, blocks: tuple[int, ...], *, lease_s: float = 10.0, address: str = ""):
    """Grant on d, start on p."""
    granted, grant = make_session(d.storage, blocks, address or d.engine.address, lease_s)
    d.engine.expect(granted)
    p.engine.start(grant)
    return grant


def send(p: Worker, grant, sources) -> None:
    p.engine.offer(grant.session_id, list(enumerate(sources)))
    p.engine.finish(grant.session_id, Tail((7, 8)))


def same(p: Worker, sources, d: Worker, targets) -> bool:
    return np.array_equal(p.storage.data[list(sources)], d.storage.data[list(targets)])


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("block_bytes", [64, 700_001])
def test_blocks_arrive(make_worker, transport, block_bytes):
    p, d = (make_worker(name, transport=transport, block_bytes=block_bytes) for name in "pd")
    targets, sources = (5, 1, 30, 2, 9), (0, 31, 7, 8, 3)
    grant = begin(p, d, targets)
    p.engine.offer(grant.session_id, [(0, 0), (1, 31)])
    p.engine.offer(grant.session_id, [(2, 7), (3, 8), (4, 3)])
    p.engine.finish(grant.session_id, Tail((7, 8)))
    assert d.wait(1) == [Arrived(grant.session_id, Tail((7, 8)))]
    assert p.wait(1) == [OutgoingDone(grant.session_id)]
    assert same(p, sources, d, targets)
    assert d.engine.stats().bytes_landed == 5 * block_bytes


def test_many_sessions_share_one_connection_both_ways(make_worker):
    a, b = make_worker("a", transport="tcp"), make_worker("b", transport="tcp")
    for number in range(12):
        for source, target in ((a, b), (b, a)):
            grant = begin(source, target, (number, 31 - number))
            send(source, grant, (number, number))
    for worker in (a, b):
        kinds = {type(event) for event in worker.wait(24)}
        assert kinds == {Arrived, OutgoingDone}
        assert len(worker.engine._sender._peers) == 1


def test_a_session_is_known_before_its_first_frame(make_worker):
    """The frames of a session never overtake the command that expects it, also when both threads are busy."""
    p, d = make_worker("p"), make_worker("d")
    for number in range(300):
        grant = begin(p, d, (number % NUM_BLOCKS,))
        send(p, grant, (0,))
        if number % 20 == 19:
            assert all(isinstance(event, Arrived) for event in d.wait(number + 1))


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("fault", ["drop", "duplicate", "corrupt"])
def test_a_fault_that_passes_is_repaired(make_worker, break_by, transport, fault):
    plan = break_by(Fault(POINT_OF[fault], Action(fault), items=(0, 2, 3), times=3))
    p, d = (make_worker(name, transport=transport) for name in "pd")
    grant = begin(p, d, (4, 5, 6, 7))
    send(p, grant, (0, 1, 2, 3))
    assert isinstance(d.wait(1)[0], Arrived)
    assert p.wait(1) == [OutgoingDone(grant.session_id)]
    assert plan.fired() == {f"{POINT_OF[fault]} {fault}": 3}
    assert same(p, range(4), d, range(4, 8))
    stats = d.engine.stats()
    assert (stats.duplicates, stats.digest_failures, stats.resends) == {
        "drop": (0, 0, 1),
        "duplicate": (3, 0, 0),
        "corrupt": (0, 3, 1),
    }[fault]


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("fault", ["drop", "corrupt"])
def test_a_fault_that_stays_fails_the_session(make_worker, break_by, transport, fault):
    break_by(Fault(POINT_OF[fault], Action(fault), items=(1,), times=ALWAYS))
    p, d = (make_worker(name, transport=transport) for name in "pd")
    grant = begin(p, d, (4, 5, 6))
    send(p, grant, (0, 1, 2))
    (failed,) = d.wait(1)
    assert isinstance(failed, IncomingFailed)
    assert "lost or damaged" in failed.reason
    assert failed.cause is (TransferCause.MISMATCHED if fault == "corrupt" else TransferCause.DAMAGED)
    assert isinstance(p.wait(1)[0], OutgoingFailed)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_every_single_byte_is_covered_by_the_digest(make_worker, break_by, transport):
    """The detector's own test: any one flipped block is noticed."""
    break_by(Fault(Point.TRANSFER_LAND, Action.CORRUPT, times=NUM_BLOCKS))
    p, d = (make_worker(name, transport=transport) for name in "pd")
    grant = begin(p, d, tuple(range(NUM_BLOCKS)))
    send(p, grant, range(NUM_BLOCKS))
    d.wait(1)
    assert d.engine.stats().digest_failures == NUM_BLOCKS
    assert same(p, range(NUM_BLOCKS), d, range(NUM_BLOCKS))


def test_a_late_reader_finds_reused_blocks_and_refuses(make_worker, break_by):
    """Lease 50 ms, the reader stalls, the sender's lease ends and its blocks get new content: nothing may arrive."""
    break_by(Fault(Point.TRANSFER_OFFER, Action.DELAY, seconds=0.12, times=ALWAYS))
    p, d = make_worker("p"), make_worker("d")
    for round_number in range(8):
        targets, sources = (1, 2, 3), (4, 5, 6)
        granted, grant = make_session(d.storage, targets, d.engine.address, 0.05)
        d.engine.expect(dataclasses.replace(granted, lease_s=5.0))  # the reader's patience is not what saves it
        p.engine.start(grant)
        send(p, grant, sources)
        assert isinstance(p.wait(round_number + 1)[-1], OutgoingFailed)
        for block in sources:
            p.storage.generations[block] += 1
            p.storage.data[block] ^= 0xFF
        assert isinstance(d.wait(round_number + 1)[-1], IncomingFailed)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_forget_closes_and_frees_the_sender(make_worker, transport):
    p, d = (make_worker(name, transport=transport) for name in "pd")
    grant = begin(p, d, (4, 5, 6))
    p.engine.offer(grant.session_id, [(0, 0)])
    d.engine.forget(grant.session_id)
    d.engine.forget(b"?" * 16)
    assert d.wait(1) == [IncomingClosed(grant.session_id)]
    send(p, grant, (0, 1, 2))
    assert isinstance(p.wait(1)[0], OutgoingFailed)
    before = d.storage.data.copy()
    send(p, grant, (0, 1, 2))
    good = begin(p, d, (9,))
    send(p, good, (0,))
    assert d.wait(2)[1] == Arrived(good.session_id, Tail((7, 8)))
    assert np.array_equal(before[4:7], d.storage.data[4:7])


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_abandon_tells_the_peer(make_worker, transport):
    p, d = (make_worker(name, transport=transport) for name in "pd")
    grant = begin(p, d, (4, 5, 6))
    p.engine.offer(grant.session_id, [(0, 0)])
    p.engine.abandon(grant.session_id, "the client left")
    p.engine.abandon(b"?" * 16, "unknown")
    assert p.wait(1) == [OutgoingFailed(grant.session_id, "the client left")]
    # If Open had not left yet, the peer cannot know, and the session ends by its lease or by `forget`.
    d.engine.forget(grant.session_id)
    assert isinstance(d.wait(1)[0], (IncomingFailed, IncomingClosed))


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_pings_keep_a_waiting_session_alive(make_worker, transport):
    p, d = (make_worker(name, transport=transport) for name in "pd")
    grant = begin(p, d, (4,), lease_s=0.3)
    time.sleep(1.0)
    send(p, grant, (0,))
    assert isinstance(d.wait(1)[0], Arrived)


def test_a_granted_session_nobody_fills_expires(make_worker):
    d = make_worker("d")
    granted, _ = make_session(d.storage, (1,), "127.0.0.1:1", 0.1)
    d.engine.expect(granted)
    assert d.wait(1) == [IncomingFailed(granted.session_id, "no sign of the sender for 0.1 s")]


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("ways", [{"to_target": True, "to_client": True}, {"to_target": False, "to_client": True}])
def test_partition(make_worker, transport, ways):
    """Short: the transfer goes on. Long: both sides end by their own lease, and after the heal a new one works."""
    p, d = (make_worker(name, transport=transport) for name in "pd")
    proxy = TcpProxy(d.engine.address)
    try:
        short = begin(p, d, (1, 2), lease_s=1.0, address=proxy.address)
        proxy.cut(**ways)
        time.sleep(0.2)
        send(p, short, (3, 4))
        proxy.heal()
        assert isinstance(d.wait(1)[0], Arrived)
        assert isinstance(p.wait(1)[0], OutgoingDone)
        proxy.cut(**ways)
        long = begin(p, d, (5, 6), lease_s=0.3, address=proxy.address)
        p.engine.offer(long.session_id, [(0, 3)])
        assert isinstance(p.wait(2)[1], OutgoingFailed)
        assert isinstance(d.wait(2)[1], IncomingFailed)
        proxy.heal()
        healed = begin(p, d, (7,), address=proxy.address)
        send(p, healed, (0,))
        assert isinstance(d.wait(3)[2], Arrived)
        assert isinstance(p.wait(3)[2], OutgoingDone)
    finally:
        proxy.close()


@pytest.mark.parametrize("transport", ["shared_memory", "tcp"])
@pytest.mark.parametrize("die_after", [None, 3])
def test_a_sender_process(make_worker, transport, die_after):
    """Across processes; killed after k of n blocks the session fails at once, not at its lease's end."""
    faults = () if die_after is None else (Fault(Point.TRANSFER_SENT, Action.KILL, after=die_after),)
    d = make_worker("d", transport=transport, block_bytes=4096)
    granted, grant = make_session(d.storage, tuple(range(8)), d.engine.address, 30.0)
    d.engine.expect(granted)
    order = {
        "grant": {**dataclasses.asdict(grant), "session_id": grant.session_id.hex()},
        "transport": transport,
        "num_blocks": 16,
        "block_bytes": 4096,
        "plan": FaultPlan(faults).to_line(),
        "key": "5a" * 32,
    }
    done = subprocess.run(
        [sys.executable, "-m", "fakes.transfer_process"],
        input=json.dumps(order) + "\n",
        capture_output=True,
        text=True,
        cwd=TESTS,
        timeout=30,
        check=False,
    )
    (event,) = d.wait(1, timeout_s=5)
    if die_after is None:
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout) == ["OutgoingDone"]
        assert event == Arrived(grant.session_id, Tail((1,)))
        assert [int(row[0]) for row in d.storage.data[:8]] == list(range(1, 9))
    else:
        assert done.returncode == -9
        assert isinstance(event, IncomingFailed)
        assert event.reason.startswith("sender lost")
        assert d.engine.stats().fragments_landed <= die_after


def test_a_receiver_that_stops_fails_the_senders_sessions_at_once(make_worker):
    p, d = make_worker("p"), make_worker("d")
    grant = begin(p, d, (1,))
    p.engine.offer(grant.session_id, [(0, 0)])
    time.sleep(0.1)
    d.engine.stop()
    assert isinstance(d.wait(1)[0], IncomingFailed)
    assert isinstance(p.wait(1, timeout_s=2)[0], OutgoingFailed)
    late = begin(p, d, (2,))
    assert isinstance(p.wait(2, timeout_s=2)[1], OutgoingFailed)
    assert d.wait(2)[1].session_id == late.session_id


def test_stop_joins_and_leaves_nothing(make_worker):
    def resources():
        gc.collect()  # or an earlier test's garbage closes its files in between
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    for _ in range(2):  # the first round warms whatever is made once
        before = resources()
        p, d = make_worker("p"), make_worker("d")
        grant = begin(p, d, (1,))
        send(p, grant, (0,))
        d.wait(1)
        for worker in (p, d):
            worker.close()
            assert not worker.engine.alive
            worker.engine.stop()
        assert resources() == before


def test_after_stop_sessions_end_at_once(make_worker):
    p = make_worker("p")
    p.engine.stop()
    granted, grant = make_session(p.storage, (1,), "127.0.0.1:1")
    p.engine.expect(granted)
    p.engine.start(grant)
    assert [type(event) for event in p.wait(2)] == [IncomingFailed, OutgoingFailed]


def test_a_dead_address(make_worker):
    p, d = make_worker("p"), make_worker("d")
    begin(p, d, (1,), address="127.0.0.1:1")
    begin(p, d, (2,), address="no.such.host:80")
    assert all(isinstance(event, OutgoingFailed) for event in p.wait(2, timeout_s=2))


def test_another_key_is_refused(make_worker):
    p, d = make_worker("p", cluster_key="11" * 32), make_worker("d", cluster_key="22" * 32)
    begin(p, d, (1,), lease_s=0.5)
    assert isinstance(p.wait(1)[0], OutgoingFailed)
    assert d.wait(1)[0].reason.startswith("no sign of the sender")


def test_incompatible_peers(make_worker):
    p, d = make_worker("p"), make_worker("d", compatibility="another model")
    _, grant = make_session(d.storage, (1,), d.engine.address)
    p.engine.start(dataclasses.replace(grant, compatibility="another model"))  # known from the grant
    p.engine.start(dataclasses.replace(grant, session_id=b"2" * 16))  # a grant that lies: the hello tells
    events = p.wait(2)
    assert all(isinstance(event, OutgoingFailed) and "incompatible" in event.reason for event in events)
    assert d.engine.stats().connections_refused == 1


@pytest.mark.parametrize("transport", ["auto", "shared_memory"])
def test_without_a_view_of_the_peer_memory(make_worker, monkeypatch, transport):
    """`auto` falls back to TCP; who insists on shared memory gets a failure that says so."""

    def no_access(path):
        raise PermissionError(13, "denied")

    monkeypatch.setattr(KVStorage, "attach", staticmethod(no_access))
    p, d = (make_worker(name, transport=transport) for name in "pd")
    grant = begin(p, d, (1,), lease_s=0.5)
    send(p, grant, (0,))
    (event,) = p.wait(1)
    if transport == "auto":
        assert isinstance(event, OutgoingDone)
        assert same(p, (0,), d, (1,))
    else:
        assert "shared memory only" in event.reason


def test_garbage_does_not_disturb_neighbours(make_worker):
    p, d = make_worker("p", transport="tcp"), make_worker("d", transport="tcp")
    grant = begin(p, d, (1, 2))
    host, port = d.engine.address.split(":")
    noise = np.random.default_rng(3).bytes(4096)
    for garbage in (b"GET / HTTP/1.1\r\n\r\n" * 4, noise, b"PNSK" + noise, b"PNSK\x01\0\0\0" + noise):
        with socket.create_connection((host, int(port))) as stranger:
            stranger.settimeout(5)
            stranger.sendall(garbage)
            received = b""
            try:
                while data := stranger.recv(4096):
                    received += data
            except ConnectionResetError:
                pass
            assert len(received) <= 24  # the preface and nothing else
    send(p, grant, (0, 5))
    assert isinstance(d.wait(1)[0], Arrived)


@pytest.mark.parametrize(
    ("changes", "options", "key"),
    [
        ({"transport": "pigeon"}, {}, "transfer.transport"),
        ({"max_frame_bytes": 1000}, {}, "transfer.max_frame_bytes"),
        ({"digest_sample": 1.5}, {}, "transfer.digest_sample"),
        ({"lease_s": 0.0}, {}, "transfer.lease_s"),
        ({"host": "0.0.0.0"}, {}, "transfer.host"),
        ({"host": "192.0.2.1"}, {}, "transfer.host"),
        ({}, {"cluster_key": "not hex"}, "cluster_key"),
    ],
)
def test_settings_that_cannot_work_are_named(changes, options, key):
    storage = KVStorage.create(2, 64)
    given = {"worker_id": "w", "epoch": 1, "host_id": "h", "compatibility": "c", "cluster_key": "", **options}
    with pytest.raises(ConfigError) as caught:
        TransferEngine(
            dataclasses.replace(TransferSettings(), **changes),
            storage,
            wake=lambda: None,
            clock=time.monotonic,
            **given,
        )
    assert caught.value.key == key
    storage.close()
