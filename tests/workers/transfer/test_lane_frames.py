"""Blocks that travel on lanes, over Gloo: the sessions' rules hold as they do for the other transports."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from fakes.fault_plan import ALWAYS, Action, Fault
from fakes.lane_worker import LaneWorker
from fakes.rank_sides import (
    BLOCKS,
    HEAD_BYTES,
    PIECES,
    SOURCES,
    TARGETS,
    RankSide,
    begin,
    block_bytes,
    require_landed,
    send,
)
from fakes.transfer_pair import EPOCH, Worker

from penstock.workers.device_transfer import CardStorage
from penstock.workers.errors import ConfigError
from penstock.workers.fault_points import Point
from penstock.workers.kv.device_storage import DeviceKVStorage
from penstock.workers.kv.storage import KVStorage
from penstock.workers.protocol import Grant
from penstock.workers.settings import TransferSettings
from penstock.workers.transfer import lane_frames
from penstock.workers.transfer.head_slices import HeadShare
from penstock.workers.transfer.port import (
    Incoming,
    IncomingClosed,
    IncomingFailed,
    OutgoingFailed,
)

SETTINGS = TransferSettings(transport="nccl", lease_s=4.0)


class Group(RankSide):
    """On lanes."""

    def __init__(self, name: str, total: int, width: int, settings: TransferSettings, **options: object) -> None:
        self._settings = settings
        super().__init__(name, total, width, **options)

    def make_rank(self, name: str, share: HeadShare, **options: object) -> LaneWorker:
        return LaneWorker(name, self._settings, BLOCKS, block_bytes(share), share=share, pieces=PIECES, **options)

    def data(self, rank):
        return rank.pool.tensor[:BLOCKS].numpy()


@pytest.fixture
def make_groups():
    made: list[Group] = []

    def make(total=1, source=1, target=1, settings=SETTINGS, source_options=None, target_options=None):
        made.append(Group("p", total, source, settings, **(source_options or {})))
        made.append(Group("d", total, target, settings, **(target_options or {})))
        return made[-2], made[-1], made[-2].fill(total)

    yield make
    for group in made:
        group.close()


@pytest.mark.parametrize(("total", "source", "target"), [(1, 1, 1), (4, 1, 2), (4, 2, 1), (2, 4, 2), (1, 2, 4)])
def test_every_rank_gets_its_heads(make_groups, total, source, target):
    p, d, model = make_groups(total, source, target)
    session = begin(p, d)
    send(p, session)
    require_landed(p, d, model, session)
    assert all(rank.engine.stats().bytes_landed for rank in d.ranks)


def test_many_frames_one_after_the_other(make_groups, monkeypatch):
    """More than may be in flight, and sessions that share the lane."""
    monkeypatch.setattr(lane_frames, "FRAME_BYTES", 1)
    p, d, model = make_groups()
    for rank in d.ranks:
        rank.events.clear()
    sessions = [begin(p, d, targets) for targets in ((0, 1, 2, 3), (4, 5, 6, 7), (8, 9, 10, 11))]
    for session in sessions:
        send(p, session)
    assert {event.session_id for event in d.ranks[0].wait(3)} == set(sessions)
    found = d.rows(d.shares[0])
    np.testing.assert_array_equal(found, np.concatenate([model[list(SOURCES)]] * 3))


def test_a_damaged_block_is_sent_again(make_groups, break_by):
    plan = break_by(Fault(Point.TRANSFER_LAND, Action.CORRUPT, items=(2,)))
    p, d, model = make_groups()
    session = begin(p, d)
    send(p, session)
    require_landed(p, d, model, session)
    assert plan.fired() == {"transfer.land corrupt": 1}
    assert d.ranks[0].engine.stats().digest_failures == 1


def test_a_block_that_stays_damaged_fails_the_session_and_is_never_written(make_groups, break_by):
    break_by(Fault(Point.TRANSFER_LAND, Action.CORRUPT, items=(2,), times=ALWAYS))
    p, d, _ = make_groups()
    session = begin(p, d)
    send(p, session)
    assert isinstance(d.ranks[0].wait(1)[0], IncomingFailed)
    assert isinstance(p.ranks[0].wait(1)[0], OutgoingFailed)
    assert not d.rows(d.shares[0])[TARGETS[2]].any()


def test_what_was_dropped_or_came_twice(make_groups, break_by):
    break_by(
        Fault(Point.TRANSFER_SEND, Action.DROP, items=(1,)), Fault(Point.TRANSFER_SEND, Action.DUPLICATE, items=(0,))
    )
    p, d, model = make_groups()
    session = begin(p, d)
    send(p, session)
    require_landed(p, d, model, session)
    assert d.ranks[0].engine.stats().resends == 1


def test_a_reused_block_is_not_written(make_groups):
    p, d, _ = make_groups()
    session = begin(p, d)
    d.ranks[0].pool.generations[TARGETS[1]] += 1
    send(p, session)
    (event,) = d.ranks[0].wait(1)
    assert isinstance(event, IncomingFailed)
    assert "reused" in event.reason
    assert not d.rows(d.shares[0]).any()


def test_a_late_frame_finds_its_session_gone_and_the_next_one_in_order(make_groups, break_by):
    """Frames of a forgotten session still take their turn on the lane, and are written nowhere."""
    break_by(Fault(Point.TRANSFER_SEND, Action.DELAY, seconds=0.3, times=ALWAYS))
    p, d, model = make_groups()
    gone = begin(p, d, (1, 3, 6, 8))
    send(p, gone)
    d.ranks[0].engine.forget(gone)
    assert d.ranks[0].wait(1) == [IncomingClosed(gone)]
    assert isinstance(p.ranks[0].wait(1)[0], OutgoingFailed)
    d.ranks[0].events.clear()
    p.ranks[0].events.clear()
    session = begin(p, d)
    send(p, session)
    require_landed(p, d, model, session)


def test_a_receiver_that_ends(make_groups):
    p, d, _ = make_groups()
    session = begin(p, d)
    d.ranks[0].engine.stop()
    send(p, session)
    assert isinstance(p.ranks[0].wait(1)[0], OutgoingFailed)


@pytest.mark.parametrize("nccl_sends", [True, False])
def test_one_side_without_lanes_is_refused(nccl_sends):
    other = Worker("t", KVStorage.create(BLOCKS, PIECES * HEAD_BYTES), TransferSettings(transport="tcp"))
    own = LaneWorker("n", SETTINGS, BLOCKS, PIECES * HEAD_BYTES)
    source, target = (own, other) if nccl_sends else (other, own)
    session = os.urandom(16)
    target.engine.expect(Incoming(session, EPOCH, (0,), (0,), 1.0))
    source.engine.start(Grant(session, "d", EPOCH, target.engine.address, "", 0, (0,), (0,), 1.0, "same"))
    (event,) = source.wait(1)
    assert isinstance(event, OutgoingFailed)
    assert "NCCL" in event.reason
    source.close()
    target.close()


def test_nccl_is_refused_at_start_where_the_pool_is_in_host_memory():
    card = CardStorage(DeviceKVStorage.create(2, 64, torch.device("cpu")))
    for storage in (KVStorage.create(2, 64), card):
        with pytest.raises(ConfigError, match="host memory") as caught:
            Worker("n", storage, SETTINGS)
        assert caught.value.key == "transfer.transport"
