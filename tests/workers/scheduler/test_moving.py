"""A running sequence that is to go on at a peer: what leaves when, and that it stays whole if nothing comes of it."""

from __future__ import annotations

import pytest
from fakes.scheduler_stand import BLOCK, Stand, held_blocks, make_request, make_stand

from penstock.workers.protocol import EndReason
from penstock.workers.scheduler.events import SequenceKey, StaysEvent, Work
from penstock.workers.scheduler.moving import MoveTerms

PROMPT = list(range(1, 11))


def running(tokens: int = 3, max_tokens: int = 12) -> tuple[Stand, SequenceKey]:
    stand = make_stand()
    key = stand.submit(1, Work.GENERATE, make_request(PROMPT, max_tokens))
    while len(stand.tokens.get(1, ())) < tokens:
        stand.step()
    return stand, key


def alone(max_tokens: int = 12) -> list[int]:
    stand, _ = running(max_tokens=max_tokens)
    stand.run()
    return stand.tokens[1]


def test_full_blocks_leave_first_then_the_rest_with_the_tokens_that_the_peer_lacks() -> None:
    stand, key = running(tokens=3)
    assert stand.scheduler.moves.begin(key, MoveTerms(0, 6, emitted=2)) == ""
    ((offered_key, fragments),), tails = stand.scheduler.moves.collect()
    assert (offered_key, [index for index, _ in fragments], tails) == (key, [0, 1, 2], [])
    stand.step()
    assert len(stand.tokens[1]) == 4, "it decodes on meanwhile"
    stand.scheduler.moves.caught_up(key)
    (offer,), (tail,) = stand.scheduler.moves.collect()
    assert [index for index, _ in offer.fragments] == [3]
    assert (list(tail.tokens), tail.fragments) == (stand.tokens[1][2:], 4)
    assert stand.step() is None, "a paused sequence is in no plan"
    stand.scheduler.moves.done(key)
    stand.scheduler.check_integrity()
    assert stand.scheduler.stats().running == 0
    assert not held_blocks(stand.pool, stand.cache)
    assert stand.take() == []


@pytest.mark.parametrize("paused", [False, True])
def test_a_move_that_fails_changes_nothing(paused: bool) -> None:
    stand, key = running()
    assert stand.scheduler.moves.begin(key, MoveTerms(1, 5, emitted=3)) == ""
    stand.scheduler.moves.collect()
    if paused:
        stand.scheduler.moves.caught_up(key)
        stand.scheduler.moves.collect()
    stand.scheduler.moves.failed(key, "the peer is gone")
    assert stand.take() == [StaysEvent(key, "the peer is gone")]
    stand.run()
    assert stand.tokens[1] == alone()
    assert not held_blocks(stand.pool, stand.cache)


def test_where_the_peers_room_ends_the_sequence_leaves_at_once() -> None:
    stand, key = running(tokens=3)
    assert stand.scheduler.moves.begin(key, MoveTerms(0, 3, emitted=3)) == ""
    offers, (tail,) = stand.scheduler.moves.collect()
    assert sum(len(offer.fragments) for offer in offers) == tail.fragments == 12 // BLOCK
    assert tail.tokens == ()


def test_an_end_or_a_cancel_here_holds_the_blocks_until_the_peer_reads_no_more() -> None:
    for cancelled in (False, True):
        stand, key = running(tokens=10)
        assert stand.scheduler.moves.begin(key, MoveTerms(0, 6, emitted=10)) == ""
        stand.scheduler.moves.collect()
        if cancelled:
            stand.scheduler.cancel(key, 0.0)
        else:
            stand.run()
            assert stand.ends[1] == EndReason.LENGTH
            assert [tail.key for outcome in stand.outcomes for tail in outcome.sent_tails] == [key]
        assert held_blocks(stand.pool, stand.cache)
        stand.scheduler.moves.failed(key, "given up")
        stand.scheduler.check_integrity()
        assert not held_blocks(stand.pool, stand.cache)
        assert stand.take() == []


def test_only_what_decodes_can_move_and_only_to_who_knows_no_more() -> None:
    stand, key = running()
    moves = stand.scheduler.moves
    assert moves.begin(SequenceKey("a", 9, 0), MoveTerms(0, 6, 0)) == "it does not decode here at the moment"
    assert "longer context" in moves.begin(key, MoveTerms(4, 6, 0))
    assert "not generated here" in moves.begin(key, MoveTerms(0, 6, 9))
    assert "outgrown" in moves.begin(key, MoveTerms(0, 2, 0))
    assert moves.begin(key, MoveTerms(0, 6, 0)) == ""
    assert moves.begin(key, MoveTerms(0, 6, 0)) == "it is on its way already"
