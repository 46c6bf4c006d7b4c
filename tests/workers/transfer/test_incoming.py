"""An incoming session counts each fragment once, for one connection, while its blocks are the granted ones."""

from __future__ import annotations

import numpy as np
import pytest
from fakes.hostile_link import HostileChannel

from penstock.workers.transfer.head_slices import ALONE, HeadRange
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


@pytest.fixture
def delivery(session):
    """The whole session comes from one sender."""
    return session.delivery(HostileChannel(), GRANTED.epoch, ALONE.heads, now=1.0)


def test_targets_are_the_granted_blocks_once_each(delivery):
    assert delivery.targets(offer((1, 102), (0, 104), (1, 102)), GENERATIONS) == [2, 4, None]
    delivery.mark(1)
    delivery.mark(1)
    assert delivery.targets(offer((1, 102), (2, 109)), GENERATIONS) == [None, 9]


@pytest.mark.parametrize("bad", [(3, 104), (2**32 - 1, 104)])
def test_a_fragment_outside_the_grant(delivery, bad):
    with pytest.raises(SessionError, match="of a session of 3"):
        delivery.targets(offer(bad), GENERATIONS)


def test_a_reused_block(delivery):
    with pytest.raises(SessionError, match="reused"):
        delivery.targets(offer((0, 103)), GENERATIONS)  # the sender means another life of the block
    with pytest.raises(SessionError, match="reused"):
        delivery.targets(offer((0, 104)), GENERATIONS + np.uint64(1))  # our pool has moved on


def test_whole_needs_all_fragments_and_the_tail_in_any_order(session, delivery):
    assert delivery.finish((8,)) == (0, 1, 2)
    for fragment in (2, 0):
        delivery.mark(fragment)
    assert not session.whole
    delivery.mark(1)
    assert session.whole
    assert delivery.finish((9,)) == ()
    assert session.tokens == (8,)


def test_asking_again_has_an_end(delivery):
    delivery.mark(1)
    for _ in range(MAX_RESEND_ROUNDS):
        assert delivery.finish((8,)) == (0, 2)
    with pytest.raises(SessionError, match="2 of 3"):
        delivery.finish((8,))


def test_one_connection_one_epoch(session):
    first, second = HostileChannel(), HostileChannel()
    assert session.delivery(first, 2, ALONE.heads, 1.0) is None
    found = session.delivery(first, 3, ALONE.heads, 1.0)
    assert session.channels == [first]
    assert session.delivery(second, 3, ALONE.heads, 1.0) is None
    assert session.delivery(first, 3, ALONE.heads, 1.0) is found
    session.open = False
    assert session.delivery(first, 3, ALONE.heads, 1.0) is None


def test_senders_with_other_heads_make_it_whole_together():
    session = IncomingSession(GRANTED, now=1.0, own=HeadRange(4, 4))
    low = session.delivery(HostileChannel(), 3, HeadRange(4, 2), 2.0)
    assert session.delivery(HostileChannel(), 3, HeadRange(5, 1), 2.0) is None  # that head has a sender
    for fragment in range(3):
        low.mark(fragment)
    assert low.finish((8,)) == ()
    assert not session.whole
    assert session.expires == 6.0  # by then the other heads must have a sender
    high = session.delivery(HostileChannel(), 3, HeadRange(6, 2), 3.0)
    assert session.expires == 7.0
    low.renew(9.0)
    assert session.expires == 8.0  # each of them has to give signs
    assert high.targets(offer((0, 104)), GENERATIONS) == [4]  # its slice of the same block
    assert high.finish((8,)) == (0, 1, 2)
    for fragment in range(3):
        high.mark(fragment)
    assert session.whole


def test_senders_must_agree_about_the_tokens():
    session = IncomingSession(GRANTED, now=1.0, own=HeadRange(0, 2))
    first, second = (session.delivery(HostileChannel(), 3, HeadRange(head, 1), 1.0) for head in range(2))
    first.finish((8,))
    with pytest.raises(SessionError, match="different tokens"):
        second.finish((9,))


def test_lease_and_end(session):
    assert session.expires == 6.0
    delivery = session.delivery(HostileChannel(), 3, ALONE.heads, 4.0)
    assert session.expires == 9.0
    session.open = False
    delivery.mark(0)
    assert delivery.finish(()) == (0, 1, 2)
