"""An outgoing session sends each fragment once, Finish last, and again what the peer lacks."""

from __future__ import annotations

import pytest

from penstock.workers.protocol import Grant
from penstock.workers.transfer.incoming import MAX_RESEND_ROUNDS, SessionError
from penstock.workers.transfer.outgoing import OutgoingSession
from penstock.workers.transfer.port import Tail

GRANT = Grant(b"s" * 16, "d", 1, "127.0.0.1:1", "h", 0, (1, 2, 3), (0, 0, 0), 5.0)


@pytest.fixture
def session():
    return OutgoingSession(GRANT)


def test_fragments_leave_once_and_finish_comes_last(session):
    assert session.ready  # Open is still to be sent
    session.opened = True
    assert not session.ready
    session.offer([(0, 7), (1, 8)])
    session.offer([(1, 8), (2, 9)])
    session.finish(Tail((1,)))
    assert not session.finish_due
    assert session.take(2) == [(0, 7), (1, 8)]
    assert session.take(2) == [(2, 9)]
    assert session.finish_due
    session.finished_at = 1.0
    assert not session.ready


def test_a_late_tail_does_not_replace_the_first(session):
    session.offer([(0, 7), (1, 8), (2, 9)])
    session.finish(Tail((1,)))
    session.finish(Tail((2,)))
    assert session.tail == Tail((1,))


def test_offers_outside_the_grant_and_early_ends(session):
    for fragment in (-1, 3):
        with pytest.raises(SessionError, match="grant of 3"):
            session.offer([(fragment, 7)])
    session.offer([(0, 7)])
    with pytest.raises(SessionError, match="1 of 3"):
        session.finish(Tail((1,)))


def test_resend(session):
    session.offer([(0, 7), (1, 8), (2, 9)])
    session.resend([1])  # before Finish: an answer to nothing
    assert session.take(9) == [(0, 7), (1, 8), (2, 9)]
    session.finish(Tail((1,)))
    for _ in range(MAX_RESEND_ROUNDS):
        session.finished_at = 1.0
        session.resend([1])
        assert session.take(9) == [(1, 8)]
        assert session.finish_due
    session.finished_at = 1.0
    with pytest.raises(SessionError, match="too often"):
        session.resend([1])


def test_resend_of_what_was_never_offered(session):
    session.finished_at = 1.0
    with pytest.raises(SessionError):
        session.resend([2])
