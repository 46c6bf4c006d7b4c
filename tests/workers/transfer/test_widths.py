"""Whole groups of transfer engines of different widths: every rank ends up with its own heads of every block."""

from __future__ import annotations

import os

import numpy as np
import pytest
from fakes.fault_plan import Action, Fault
from fakes.rank_sides import (
    BLOCKS,
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

from penstock.workers.fault_points import Point
from penstock.workers.kv.storage import KVStorage
from penstock.workers.protocol import Grant
from penstock.workers.settings import TransferSettings
from penstock.workers.transfer.head_slices import HeadShare
from penstock.workers.transfer.port import Arrived, Incoming, IncomingFailed, OutgoingFailed, Tail

PAIRS = [(4, 1, 2), (4, 2, 1), (4, 2, 4), (4, 4, 2), (4, 4, 1), (4, 1, 4), (2, 4, 2), (2, 2, 8), (1, 2, 4), (1, 4, 1)]


class Group(RankSide):
    """In host memory."""

    def __init__(self, name: str, total: int, width: int, transport: str, **options: object) -> None:
        self._settings = TransferSettings(transport=transport, digest="full", lease_s=5.0)
        super().__init__(name, total, width, **options)

    def make_rank(self, name: str, share: HeadShare, **options: object) -> Worker:
        storage = KVStorage.create(BLOCKS, block_bytes(share))
        return Worker(name, storage, self._settings, share=share, pieces=PIECES, **options)

    def data(self, rank):
        return rank.storage.data


@pytest.fixture
def make_groups():
    made: list[Group] = []

    def make(total, source, target, transport="tcp", source_options=None, target_options=None):
        made.append(Group("p", total, source, transport, **(source_options or {})))
        made.append(Group("d", total, target, transport, **(target_options or {})))
        return made[-2], made[-1], made[-2].fill(total)

    yield make
    for group in made:
        group.close()


@pytest.mark.parametrize("transport", ["tcp", "shared_memory"])
@pytest.mark.parametrize(("total", "source", "target"), PAIRS)
def test_every_rank_gets_its_heads(make_groups, total, source, target, transport):
    p, d, model = make_groups(total, source, target, transport)
    session = begin(p, d)
    send(p, session)
    require_landed(p, d, model, session)


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


def test_a_damaged_slice_is_sent_again(make_groups, break_by):
    plan = break_by(Fault(Point.TRANSFER_LAND, Action.CORRUPT, "d1", items=(2,)))
    p, d, model = make_groups(4, 4, 2)
    session = begin(p, d)
    for rank in p.ranks:
        rank.engine.offer(session, list(enumerate(SOURCES)))
        rank.engine.finish(session, Tail((42,)))
    for share, rank in zip(d.shares, d.ranks, strict=True):
        assert rank.wait(1) == [Arrived(session, Tail((42,)))]
        expected = model[list(SOURCES), :, share.heads.first : share.heads.end]
        np.testing.assert_array_equal(d.rows(share)[list(TARGETS)], expected)
    assert plan.fired() == {"transfer.land corrupt": 1}
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
