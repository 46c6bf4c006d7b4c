"""An incoming session counts each fragment once, for one connection, while its blocks are the granted ones."""

from __future__ import annotations

import numpy as np
import pytest
from fakes.hostile_link import HostileChannel

from penstock.workers.transfer.incoming import MAX_RESEND_ROUNDS, IncomingSession, SessionError
from penstock.workers.transfer.messages import OFFER_DTYPE, Offer
from penstock.workers.transfer.port import Incoming

GENERATIONS = np.arange(100, 110, dtype=np.uint64)
GRANTED = Incoming(b"s" * 16, 3, (4, 2, 9), (104, 102, 109), 5.0)


def offer(*fragments: tuple[int, int]) -> Offer:
    entries = np.zeros(len(fragments), OFFER_DTYPE)
    entries["fragment"], entries["target_generation"] = zip(*fragments, strict=True)
    return Offer(GRANTED.session_id, GRANTED.epoch, False, entries)


@pytest.fixture
def session():
    return IncomingSession(GRANTED, now=1.0)


def test_targets_are_the_granted_blocks_once_each(session):
    assert session.targets(offer((1, 102), (0, 104), (1, 102)), GENERATIONS) == [2, 4, None]
    session.mark(1)
    session.mark(1)
    assert session.targets(offer((1, 102), (2, 109)), GENERATIONS) == [None, 9]


@pytest.mark.parametrize("bad", [(3, 104), (2**32 - 1, 104)])
def test_a_fragment_outside_the_grant(session, bad):
    with pytest.raises(SessionError, match="of a session of 3"):
        session.targets(offer(bad), GENERATIONS)


def test_a_reused_block(session):
    with pytest.raises(SessionError, match="reused"):
        session.targets(offer((0, 103)), GENERATIONS)  # the sender means another life of the block
    with pytest.raises(SessionError, match="reused"):
        session.targets(offer((0, 104)), GENERATIONS + np.uint64(1))  # our pool has moved on


def test_whole_needs_all_fragments_and_the_tail_in_any_order(session):
    assert session.finish((8,)) == (0, 1, 2)
    for fragment in (2, 0):
        session.mark(fragment)
    assert not session.whole
    session.mark(1)
    assert session.whole
    assert session.finish((9,)) == ()
    assert session.tokens == (8,)


def test_asking_again_has_an_end(session):
    session.mark(1)
    for _ in range(MAX_RESEND_ROUNDS):
        assert session.finish((8,)) == (0, 2)
    with pytest.raises(SessionError, match="2 of 3"):
        session.finish((8,))


def test_one_connection_one_epoch(session):
    first, second = HostileChannel(), HostileChannel()
    assert not session.bind(first, 2)
    assert session.bind(first, 3)
    assert not session.bind(second, 3)
    assert session.bind(first, 3)
    session.open = False
    assert not session.bind(first, 3)


def test_lease_and_end(session):
    assert session.expires == 6.0
    session.renew(4.0)
    assert session.expires == 9.0
    session.open = False
    session.mark(0)
    assert session.finish(()) == (0, 1, 2)
