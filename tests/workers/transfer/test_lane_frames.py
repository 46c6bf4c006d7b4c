"""Blocks that travel on lanes, over Gloo: the sessions' rules hold as they do for the other transports."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from fakes.lane_worker import LaneWorker
from fakes.transfer_pair import EPOCH, Worker

from penstock.workers.device_transfer import CardStorage
from penstock.workers.errors import ConfigError
from penstock.workers.kv.device_storage import DeviceKVStorage
from penstock.workers.kv.storage import KVStorage
from penstock.workers.protocol import Grant
from penstock.workers.settings import TransferSettings
from penstock.workers.transfer import lane_frames
from penstock.workers.transfer.faults import TransferFaults
from penstock.workers.transfer.head_slices import HeadShare
from penstock.workers.transfer.port import (
    Arrived,
    Incoming,
    IncomingClosed,
    IncomingFailed,
    OutgoingDone,
    OutgoingFailed,
    Tail,
)

PIECES, HEAD_BYTES, BLOCKS = 4, 640, 12
SOURCES, TARGETS = (3, 5, 4, 10), (9, 2, 7, 0)
SETTINGS = TransferSettings(transport="nccl", lease_s=4.0)


class Group:
    """The ranks of one side."""

    def __init__(self, name: str, total: int, width: int, settings: TransferSettings, **options: object) -> None:
        self.shares = [HeadShare(total, width, rank) for rank in range(width)]
        self.ranks = [
            LaneWorker(
                f"{name}{share.rank}",
                settings,
                BLOCKS,
                PIECES * share.heads.count * HEAD_BYTES,
                share=share,
                pieces=PIECES,
                **(options if share.rank == width - 1 else {}),
            )
            for share in self.shares
        ]

    def rows(self, share: HeadShare) -> np.ndarray:
        """[block, piece, head, byte]; the pool's own memory."""
        return (
            self.ranks[share.rank].pool.tensor[:BLOCKS].numpy().reshape(BLOCKS, PIECES, share.heads.count, HEAD_BYTES)
        )


@pytest.fixture
def make_groups():
    made: list[Group] = []

    def make(total=1, source=1, target=1, settings=SETTINGS, source_options=None, target_options=None):
        made.append(Group("p", total, source, settings, **(source_options or {})))
        made.append(Group("d", total, target, settings, **(target_options or {})))
        model = np.random.default_rng(1).integers(0, 256, (BLOCKS, PIECES, total, HEAD_BYTES), np.uint8)
        for share in made[-2].shares:
            made[-2].rows(share)[:] = model[:, :, share.heads.first : share.heads.end]
        return made[-2], made[-1], model

    yield make
    for group in made:
        for rank in group.ranks:
            rank.close()


def begin(p: Group, d: Group, targets=TARGETS, lease_s=4.0) -> bytes:
    session, generations = os.urandom(16), (0,) * len(targets)
    for rank in d.ranks:
        rank.engine.expect(Incoming(session, EPOCH, targets, generations, lease_s))
    first, *others = [rank.engine.address for rank in d.ranks]
    grant = Grant(session, "d", EPOCH, first, "", 0, targets, generations, lease_s, "same", tuple(others))
    for rank in p.ranks:
        rank.engine.start(grant)
    return session


def send(p: Group, session: bytes) -> None:
    for rank in p.ranks:
        rank.engine.offer(session, list(enumerate(SOURCES))[:3])
        rank.engine.offer(session, list(enumerate(SOURCES))[3:])
        rank.engine.finish(session, Tail((42,)))


def require_landed(p: Group, d: Group, model: np.ndarray, session: bytes) -> None:
    for rank in d.ranks:
        assert rank.wait(1) == [Arrived(session, Tail((42,)))]
    for rank in p.ranks:
        assert rank.wait(1) == [OutgoingDone(session)]
    untouched = [block for block in range(BLOCKS) if block not in TARGETS]
    for share in d.shares:
        expected = model[list(SOURCES), :, share.heads.first : share.heads.end]
        np.testing.assert_array_equal(d.rows(share)[list(TARGETS)], expected)
        assert not d.rows(share)[untouched].any()


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


def test_a_damaged_block_is_sent_again(make_groups):
    faults = TransferFaults(corrupt=frozenset({2}), times=1)
    p, d, model = make_groups(target_options={"faults": faults})
    session = begin(p, d)
    send(p, session)
    require_landed(p, d, model, session)
    assert faults.fired == {"corrupt": 1}
    assert d.ranks[0].engine.stats().digest_failures == 1


def test_a_block_that_stays_damaged_fails_the_session_and_is_never_written(make_groups):
    p, d, _ = make_groups(target_options={"faults": TransferFaults(corrupt=frozenset({2}))})
    session = begin(p, d)
    send(p, session)
    assert isinstance(d.ranks[0].wait(1)[0], IncomingFailed)
    assert isinstance(p.ranks[0].wait(1)[0], OutgoingFailed)
    assert not d.rows(d.shares[0])[TARGETS[2]].any()


def test_what_was_dropped_or_came_twice(make_groups):
    faults = TransferFaults(drop=frozenset({1}), duplicate=frozenset({0}), times=2)
    p, d, model = make_groups(source_options={"faults": faults})
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


def test_a_late_frame_finds_its_session_gone_and_the_next_one_in_order(make_groups):
    """Frames of a forgotten session still take their turn on the lane, and are written nowhere."""
    p, d, model = make_groups(source_options={"faults": TransferFaults(delay_send_s=0.3)})
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
