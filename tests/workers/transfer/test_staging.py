"""Blocks that nobody can address travel through a few buffers: whole, to and from every kind of pool, none lost."""

from __future__ import annotations

import numpy as np
import pytest
from fakes.fault_plan import ALWAYS, Action, Fault
from fakes.opaque_pool import OpaquePool, staged
from fakes.transfer_pair import Worker, make_session

from penstock.workers.errors import ConfigError
from penstock.workers.fault_points import Point
from penstock.workers.kv.storage import KVStorage
from penstock.workers.settings import TransferSettings
from penstock.workers.transfer.port import Arrived, IncomingFailed, OutgoingDone, OutgoingFailed, Tail
from penstock.workers.transfer.staging import StagedStorage

BLOCKS, SIZE = 24, 5000
NO_CHANGE: dict[str, int] = {}


def content(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (BLOCKS, SIZE), np.uint8)


@pytest.fixture
def make():
    made = []

    def build(name, kind, seed, buffers=NO_CHANGE, **options):
        if kind == "device":
            pool = OpaquePool(BLOCKS, SIZE)
            pool.write(range(BLOCKS), content(seed))
            storage = staged(pool, **buffers)
        else:
            pool = storage = KVStorage.create(BLOCKS, SIZE)
            pool.data[:] = content(seed)
        worker = Worker(name, storage, TransferSettings(transport=options.pop("transport", "auto")), **options)
        made.append((worker, pool))
        return worker, (lambda: pool.content if kind == "device" else pool.data)

    yield build
    for worker, pool in made:
        worker.engine.stop()
        if isinstance(pool, KVStorage):
            pool.close()


def send(p, d, sources, targets):
    granted, grant = make_session(d.storage, targets, d.engine.address)
    d.engine.expect(granted)
    p.engine.start(grant)
    p.engine.offer(grant.session_id, list(enumerate(sources)))
    p.engine.finish(grant.session_id, Tail((3,)))
    return grant.session_id


@pytest.mark.parametrize("transport", ["auto", "tcp"])
@pytest.mark.parametrize(("of", "to"), [("device", "device"), ("device", "host"), ("host", "device")])
def test_blocks_arrive_from_and_to_a_device(make, of, to, transport):
    (p, _), (d, landed) = make("p", of, 1, transport=transport), make("d", to, 2)
    sources, targets = [5, 1, 2, 3, 20, 0, 9], (8, 9, 10, 3, 0, 23, 4)
    session_id = send(p, d, sources, targets)
    assert d.wait(1) == [Arrived(session_id, Tail((3,)))]
    assert p.wait(1) == [OutgoingDone(session_id)]
    assert np.array_equal(landed()[list(targets)], content(1)[sources])
    others = [block for block in range(BLOCKS) if block not in targets]
    assert np.array_equal(landed()[others], content(2)[others])


def test_the_next_blocks_are_gathered_while_the_last_ones_leave(make):
    (p, _), (d, _) = make("p", "device", 1), make("d", "device", 2)
    send(p, d, list(range(BLOCKS)), tuple(range(BLOCKS)))
    p.wait(1)
    assert p.storage._pool.most_under_way == 2
    assert p.storage._pool.gathers_under_way == 0


def test_many_sessions_both_ways_through_single_buffers(make):
    """More connections and sessions than buffers: all wait their turn, none for ever."""
    few = {"outgoing": 1, "incoming": 1, "blocks": 1}
    hub, seen = make("hub", "device", 1, buffers=few)
    others = [make(f"w{number}", "device", 2 + number, buffers=few) for number in range(3)]
    for number, (other, _) in enumerate(others):
        send(other, hub, [0, 1, 2, 3], tuple(range(4 * number, 4 * number + 4)))
        send(hub, other, [20, 21, 22, 23], (4, 5, 6, 7))
    assert {type(event) for event in hub.wait(6)} == {Arrived, OutgoingDone}
    for number, (other, held) in enumerate(others):
        assert {type(event) for event in other.wait(2)} == {Arrived, OutgoingDone}
        assert np.array_equal(seen()[4 * number : 4 * number + 4], content(2 + number)[:4])
        assert np.array_equal(held()[4:8], content(1)[20:])
    for worker, _ in [(hub, seen), *others]:
        assert (len(worker.storage._outgoing), len(worker.storage._incoming)) == (1, 1)


def test_damage_is_found_before_the_pool_is_written(make, break_by):
    break_by(Fault(Point.TRANSFER_LAND, Action.CORRUPT, items=(1, 2), times=ALWAYS))
    (p, _), (d, landed) = make("p", "device", 1), make("d", "device", 2)
    send(p, d, [4, 5, 6], (1, 2, 3))
    assert isinstance(d.wait(1)[0], IncomingFailed)
    assert isinstance(p.wait(1)[0], OutgoingFailed)
    assert np.array_equal(landed()[[1, 2, 3]], np.stack([content(1)[4], content(2)[2], content(2)[3]]))


def test_a_cancelled_session_gives_its_buffers_back(make):
    few = {"outgoing": 2, "incoming": 1, "blocks": 1}
    (p, _), (d, landed) = make("p", "device", 1, buffers=few), make("d", "device", 2, buffers=few)
    for _ in range(5):
        session_id = send(p, d, list(range(20)), tuple(range(20)))
        d.engine.forget(session_id)
    assert len(d.wait(5)) == len(p.wait(5)) == 5
    last = send(p, d, [7], (22,))
    assert d.wait(6)[5] == Arrived(last, Tail((3,)))
    assert np.array_equal(landed()[22], content(1)[7])
    p.wait(6)
    assert (len(p.storage._outgoing), len(d.storage._incoming)) == (2, 1)


@pytest.mark.parametrize("sizes", [((), (SIZE,)), ((SIZE,), ()), ((SIZE,), (SIZE - 1,))])
def test_buffers_hold_a_block_at_least(sizes):
    outgoing, incoming = ([memoryview(bytearray(size)) for size in group] for group in sizes)
    with pytest.raises(ConfigError, match="at least one block"):
        StagedStorage(OpaquePool(2, SIZE), outgoing, incoming)
