"""Whole groups of transfer engines of different widths: every rank ends up with its own heads of every block."""

from __future__ import annotations

import os

import numpy as np
import pytest
from fakes.transfer_pair import EPOCH, Worker

from penstock.workers.kv.storage import KVStorage
from penstock.workers.protocol import Grant
from penstock.workers.settings import TransferSettings
from penstock.workers.transfer.faults import TransferFaults
from penstock.workers.transfer.head_slices import HeadShare
from penstock.workers.transfer.port import Arrived, Incoming, IncomingFailed, OutgoingDone, OutgoingFailed, Tail

PIECES, HEAD_BYTES, BLOCKS = 4, 640, 12
SOURCES, TARGETS = (3, 5, 4, 10), (9, 2, 7, 0)
PAIRS = [(4, 1, 2), (4, 2, 1), (4, 2, 4), (4, 4, 2), (4, 4, 1), (4, 1, 4), (2, 4, 2), (2, 2, 8), (1, 2, 4), (1, 4, 1)]


class Group:
    """The ranks of one side."""

    def __init__(self, name: str, total: int, width: int, transport: str, **options: object) -> None:
        self.shares = [HeadShare(total, width, rank) for rank in range(width)]
        self.ranks = []
        for share in self.shares:
            storage = KVStorage.create(BLOCKS, PIECES * share.heads.count * HEAD_BYTES)
            settings = TransferSettings(transport=transport, digest="full", lease_s=5.0)
            given = options if share.rank == width - 1 else {}
            self.ranks.append(Worker(f"{name}{share.rank}", storage, settings, share=share, pieces=PIECES, **given))

    def write(self, model: np.ndarray) -> None:
        """Each rank's heads of `model` [block, piece, head, byte]."""
        for share, rank in zip(self.shares, self.ranks, strict=True):
            part = model[:, :, share.heads.first : share.heads.end]
            rank.storage.data[:] = part.reshape(BLOCKS, -1)

    def read(self, share: HeadShare) -> np.ndarray:
        return self.ranks[share.rank].storage.data.reshape(BLOCKS, PIECES, share.heads.count, HEAD_BYTES)

    def close(self) -> None:
        for rank in self.ranks:
            rank.close()


@pytest.fixture
def make_groups():
    made: list[Group] = []

    def make(total, source, target, transport="tcp", source_options=None, target_options=None):
        made.append(Group("p", total, source, transport, **(source_options or {})))
        made.append(Group("d", total, target, transport, **(target_options or {})))
        model = np.random.default_rng(1).integers(0, 256, (BLOCKS, PIECES, total, HEAD_BYTES), np.uint8)
        made[-2].write(model)
        return made[-2], made[-1], model

    yield make
    for group in made:
        group.close()


def begin(p: Group, d: Group) -> bytes:
    session = os.urandom(16)
    generations = (0,) * len(TARGETS)
    for rank in d.ranks:
        rank.engine.expect(Incoming(session, EPOCH, TARGETS, generations, 5.0))
    first, *others = [rank.engine.address for rank in d.ranks]
    grant = Grant(session, "d", EPOCH, first, "", 0, TARGETS, generations, 5.0, "same", tuple(others))
    for rank in p.ranks:
        rank.engine.start(grant)
    return session


@pytest.mark.parametrize("transport", ["tcp", "shared_memory"])
@pytest.mark.parametrize(("total", "source", "target"), PAIRS)
def test_every_rank_gets_its_heads(make_groups, total, source, target, transport):
    p, d, model = make_groups(total, source, target, transport)
    session = begin(p, d)
    for rank in p.ranks:
        rank.engine.offer(session, list(enumerate(SOURCES))[:3])
        rank.engine.offer(session, list(enumerate(SOURCES))[3:])
        rank.engine.finish(session, Tail((42,)))
    for rank in d.ranks:
        assert rank.wait(1) == [Arrived(session, Tail((42,)))]
    for rank in p.ranks:
        assert rank.wait(1) == [OutgoingDone(session)]
    untouched = [block for block in range(BLOCKS) if block not in TARGETS]
    for share in d.shares:
        expected = model[list(SOURCES), :, share.heads.first : share.heads.end]
        np.testing.assert_array_equal(d.read(share)[list(TARGETS)], expected)
        assert not d.read(share)[untouched].any()


def test_a_rank_that_never_sends_its_heads(make_groups):
    """One of two sending ranks dies: its session ends with it, and the other's with the receiver's answer."""
    p, d, _ = make_groups(4, 2, 1)
    session = begin(p, d)
    p.ranks[0].engine.offer(session, list(enumerate(SOURCES)))
    p.ranks[0].engine.finish(session, Tail((42,)))
    p.ranks[1].engine.stop()
    (event,) = d.ranks[0].wait(1)
    assert isinstance(event, IncomingFailed)
    (event,) = p.ranks[0].wait(1)
    assert isinstance(event, OutgoingFailed)


def test_a_receiving_rank_that_dies_ends_the_session_at_all(make_groups):
    p, d, _ = make_groups(4, 1, 2)
    session = begin(p, d)
    p.ranks[0].engine.offer(session, list(enumerate(SOURCES)))
    d.ranks[1].engine.stop()
    assert isinstance(p.ranks[0].wait(1)[0], OutgoingFailed)
    assert isinstance(d.ranks[0].wait(1)[0], IncomingFailed)


def test_a_damaged_slice_is_sent_again(make_groups):
    faults = TransferFaults(corrupt=frozenset({2}), times=1)
    p, d, model = make_groups(4, 4, 2, target_options={"faults": faults})
    session = begin(p, d)
    for rank in p.ranks:
        rank.engine.offer(session, list(enumerate(SOURCES)))
        rank.engine.finish(session, Tail((42,)))
    for share, rank in zip(d.shares, d.ranks, strict=True):
        assert rank.wait(1) == [Arrived(session, Tail((42,)))]
        expected = model[list(SOURCES), :, share.heads.first : share.heads.end]
        np.testing.assert_array_equal(d.read(share)[list(TARGETS)], expected)
    assert faults.fired == {"corrupt": 1}
    assert d.ranks[1].engine.stats().digest_failures == 1


def test_widths_that_do_not_divide_are_refused(make_groups):
    p, d, _ = make_groups(6, 2, 3)
    begin(p, d)
    for rank in p.ranks:
        (event,) = rank.wait(1)
        assert isinstance(event, OutgoingFailed)
        assert "neither divides the other" in event.reason


def test_heads_of_another_rank_are_refused(make_groups):
    """A sender that was told the wrong order of ranks offers heads that the receiver does not hold."""
    p, d, _ = make_groups(4, 1, 2)
    session, generations = os.urandom(16), (0,) * len(TARGETS)
    for rank in d.ranks:
        rank.engine.expect(Incoming(session, EPOCH, TARGETS, generations, 5.0))
    swapped = d.ranks[1].engine.address, (d.ranks[0].engine.address,)
    p.ranks[0].engine.start(
        Grant(session, "d", EPOCH, swapped[0], "", 0, TARGETS, generations, 5.0, "same", swapped[1])
    )
    (event,) = p.ranks[0].wait(1)
    assert isinstance(event, OutgoingFailed)
    assert sum(rank.engine.stats().connections_refused for rank in d.ranks) >= 1
