"""The sender talks only to who welcomed it, bounds what it queues, and ends every session by answer or silence."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from fakes.hostile_link import HostileChannel
from fakes.transfer_pair import EPOCH, make_session
from xxhash import xxh3_64_intdigest

from penstock.workers.errors import WireError
from penstock.workers.transfer import sender as sender_module
from penstock.workers.transfer.messages import (
    Abandon,
    Ack,
    Finish,
    Goodbye,
    Hello,
    Missing,
    Offer,
    Open,
    Ping,
    Pong,
    Reject,
    Welcome,
)
from penstock.workers.transfer.port import OutgoingDone, OutgoingFailed, Tail


@pytest.fixture
def pair(make_pair):
    return make_pair(transport="auto")


def begin(pair, blocks=(1, 2, 3), lease_s=8.0, **changes):
    _, grant = make_session(pair.target, blocks, "127.0.0.1:1", lease_s)
    grant = dataclasses.replace(grant, **changes)
    pair.sender.start(grant)
    return grant


def said(pair) -> list:
    got = [frame.message for frame in pair.link.sender_end.outbox]
    pair.link.sender_end.outbox.clear()
    return got


def hear(pair, message) -> None:
    pair.sender.on_message(pair.link.sender_end, message)


def welcome(pair, *, shared_memory=True) -> None:
    pair.sender.on_opened(pair.link.sender_end)
    hear(pair, Welcome(shared_memory))


def test_nothing_but_hello_before_the_welcome(pair):
    grant = begin(pair)
    pair.sender.offer(grant.session_id, [(0, 5)])
    assert said(pair) == []
    pair.sender.on_opened(pair.link.sender_end)
    (hello,) = said(pair)
    assert isinstance(hello, Hello)
    assert hello.segment == pair.source.path
    hear(pair, Welcome(True))
    opening, offer = said(pair)
    assert opening == Open(grant.session_id, EPOCH)
    assert offer.entries["fragment"].tolist() == [0]


def test_tcp_hides_the_segment(make_pair):
    pair = make_pair(transport="tcp")
    begin(pair)
    pair.sender.on_opened(pair.link.sender_end)
    assert said(pair)[0].segment == ""


@pytest.mark.parametrize("shared_memory", [True, False])
def test_an_offer_names_blocks_generations_and_digests(pair, shared_memory):
    pair.source.generations[5:9] = 40
    grant = begin(pair)
    welcome(pair, shared_memory=shared_memory)
    said(pair)
    pair.sender.offer(grant.session_id, [(2, 5), (0, 8)])
    (frame,) = pair.link.sender_end.outbox
    assert frame.message.inline is not shared_memory
    assert frame.message.entries.tolist() == [
        (fragment, 1, block, 40, grant.generations[fragment], xxh3_64_intdigest(pair.source.data[block]))
        for fragment, block in ((2, 5), (0, 8))
    ]
    frame.flush()
    assert frame.payload == (b"" if shared_memory else pair.source.data[[5, 8]].tobytes())


@pytest.mark.parametrize(
    ("digest", "shared_memory", "checked"),
    [("off", True, 0), ("full", True, 1), ("sampled", True, 32), ("auto", True, 32), ("auto", False, 1)],
)
def test_each_entry_says_how_it_is_digested(make_pair, digest, shared_memory, checked):
    pair = make_pair(digest=digest)
    grant = begin(pair, (1, 2, 3))
    welcome(pair, shared_memory=shared_memory)
    pair.sender.offer(grant.session_id, [(0, 0), (1, 1)])
    (offer,) = (message for message in said(pair) if isinstance(message, Offer))
    assert offer.entries["checked"].tolist() == [checked] * 2
    assert all(offer.entries["digest"] > 0) == (checked > 0)


def test_finish_waits_for_room_and_comes_after_all_blocks(pair, monkeypatch):
    monkeypatch.setattr(sender_module, "MAX_BACKLOG_BYTES", 300)
    grant = begin(pair)
    welcome(pair, shared_memory=False)
    said(pair)
    for peer in pair.sender._peers.values():
        peer.offers.blocks_per_frame[True] = 1
    pair.sender.offer(grant.session_id, [(0, 5), (1, 6), (2, 7)])
    pair.sender.finish(grant.session_id, Tail((4,)))
    assert len(pair.link.sender_end.outbox) == 2  # the third waits in the session, not in the connection
    for frame in pair.link.sender_end.outbox:
        frame.flush()
    pair.sender.on_drained(pair.link.sender_end)
    assert [type(message) for message in said(pair)] == [Offer, Offer, Offer, Finish]


def test_ends(pair):
    grants = [begin(pair) for _ in range(4)]
    welcome(pair)
    for grant in grants[:2]:
        pair.sender.offer(grant.session_id, [(0, 5), (1, 6), (2, 7)])
        pair.sender.finish(grant.session_id, Tail((4,)))
    hear(pair, Ack(grants[0].session_id, EPOCH))
    hear(pair, Ack(grants[0].session_id, EPOCH))
    hear(pair, Ack(grants[1].session_id, EPOCH - 1))  # another incarnation's answer
    hear(pair, Ack(grants[2].session_id, EPOCH))  # before its Finish: no answer to anything
    hear(pair, Reject(grants[1].session_id, EPOCH, "no"))
    hear(pair, Reject(b"?" * 16, EPOCH, "unknown"))
    pair.sender.abandon(grants[2].session_id, "enough")
    assert pair.sent == [
        OutgoingDone(grants[0].session_id),
        OutgoingFailed(grants[1].session_id, "refused by the receiver: no"),
        OutgoingFailed(grants[2].session_id, "enough"),
    ]
    assert said(pair)[-1] == Abandon(grants[2].session_id, EPOCH, "enough")
    pair.sender.on_closed(pair.link.sender_end, "reset")
    assert pair.sent[3:] == [OutgoingFailed(grants[3].session_id, "receiver lost: reset")]


def test_missing_is_sent_again(pair):
    grant = begin(pair)
    welcome(pair)
    pair.sender.offer(grant.session_id, [(0, 5), (1, 6), (2, 7)])
    pair.sender.finish(grant.session_id, Tail((4,)))
    said(pair)
    hear(pair, Missing(grant.session_id, EPOCH, (1,)))
    offer, finish = said(pair)
    assert offer.entries["source_block"].tolist() == [6]
    assert finish == Finish(grant.session_id, EPOCH, (4,))


@pytest.mark.parametrize("misuse", ["fragment outside", "early finish"])
def test_misuse_ends_the_session(pair, misuse):
    grant = begin(pair)
    welcome(pair)
    if misuse == "early finish":
        pair.sender.finish(grant.session_id, Tail((4,)))
    else:
        pair.sender.offer(grant.session_id, [(3, 5)])
    assert isinstance(pair.sent[0], OutgoingFailed)
    assert isinstance(said(pair)[-1], Abandon)


def test_pings_and_silence(pair):
    grant = begin(pair, lease_s=8.0)
    welcome(pair)
    said(pair)
    pair.now = 1.0
    assert pair.sender.sweep(1.0) == 8.0
    assert said(pair) == []
    pair.now = 2.5
    pair.sender.sweep(2.5)
    assert said(pair) == [Ping()]
    hear(pair, Pong())
    pair.sender.sweep(10.4)
    assert pair.sent == []
    assert pair.sender.sweep(10.6) is None
    assert pair.sent == [OutgoingFailed(grant.session_id, "no answer from the receiver for 8 s")]
    assert pair.link.sender_end.failure  # the next session tries a new connection


def test_a_finish_without_answer_ends_though_the_peer_lives(pair):
    grant = begin(pair, blocks=(), lease_s=8.0)
    welcome(pair)
    pair.sender.finish(grant.session_id, Tail((4,)))
    pair.now = 7.0
    hear(pair, Pong())
    pair.sender.sweep(8.1)
    assert isinstance(pair.sent[0], OutgoingFailed)
    assert pair.link.sender_end.failure is None


def test_an_idle_peer_owes_no_answer(pair):
    first = begin(pair, blocks=())
    welcome(pair)
    pair.sender.finish(first.session_id, Tail(()))
    hear(pair, Ack(first.session_id, EPOCH))
    pair.now = 1000.0
    assert pair.sender.sweep(1000.0) is None
    begin(pair)
    pair.sender.sweep(1001.0)
    assert pair.sent == [OutgoingDone(first.session_id)]


def test_goodbye(pair):
    begin(pair)
    pair.sender.on_opened(pair.link.sender_end)
    hear(pair, Goodbye("incompatible"))
    assert pair.link.sender_end.failure == "refused: incompatible"


def test_grants_that_cannot_work(pair):
    begin(pair, compatibility="other")
    pair.sender._connect = _refuse
    begin(pair, address="127.0.0.1:2")
    assert [type(event) for event in pair.sent] == [OutgoingFailed, OutgoingFailed]
    assert pair.sender._counters.open_sessions == 0


def _refuse(address):
    raise ConnectionRefusedError(111, "refused")


def test_a_second_start_and_unknown_ids_are_ignored(pair):
    grant = begin(pair)
    pair.sender.start(grant)
    for call in (pair.sender.offer, pair.sender.finish, pair.sender.abandon):
        call(b"?" * 16, ())
    assert pair.sender._counters.outgoing_started == 1
    assert pair.sent == []


def test_receivers_messages_only(pair):
    begin(pair)
    for message in (Ping(), Open(b"s" * 16, 1)):
        with pytest.raises(WireError):
            hear(pair, message)
    with pytest.raises(WireError):
        pair.sender.on_payload(pair.link.sender_end, Offer(b"s" * 16, 1, True, np.zeros(1)), 256)
    pair.sender.on_message(HostileChannel(), Ping())  # a connection already given up
