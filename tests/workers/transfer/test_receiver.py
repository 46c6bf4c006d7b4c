"""The receiver lets only the right peer, session, epoch and bytes in, and tells senders it has no use for."""

from __future__ import annotations

import numpy as np
import pytest
from fakes.hostile_link import HostileChannel
from fakes.transfer_pair import BLOCK_BYTES, EPOCH, NUM_BLOCKS, fill, make_session
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.workers.errors import WireError
from penstock.workers.transfer.messages import (
    OFFER_DTYPE,
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
from penstock.workers.transfer.port import Arrived, IncomingClosed, IncomingFailed, Tail
from penstock.workers.transfer.receiver import HANDSHAKE_TIMEOUT_S


def greet(pair, **changes) -> HostileChannel:
    """A connection of which the test plays the sender."""
    channel = HostileChannel()
    pair.receiver.on_opened(channel)
    fields = {"worker_id": "p", "compatibility": "same", "host_id": "here", "segment": pair.source.path}
    fields |= {"num_blocks": NUM_BLOCKS, "block_bytes": BLOCK_BYTES, **changes}
    pair.receiver.on_message(channel, Hello(**fields))
    return channel


def answers(channel: HostileChannel) -> list:
    got = [frame.message for frame in channel.outbox]
    channel.outbox.clear()
    return got


def offer_of(pair, grant, fragments, sources, **changes) -> Offer:
    entries = np.zeros(len(fragments), OFFER_DTYPE)
    entries["fragment"], entries["source_block"] = fragments, sources
    entries["source_generation"] = pair.source.generations[list(sources)]
    entries["target_generation"] = [grant.generations[fragment] for fragment in fragments]
    for name, value in changes.items():
        entries[name] = value
    return Offer(grant.session_id, grant.epoch, False, entries)


@pytest.fixture
def pair(make_pair):
    return make_pair(transport="shared_memory")


def expect(pair, blocks, lease_s=10.0):
    granted, grant = make_session(pair.target, blocks, "127.0.0.1:1", lease_s)
    pair.receiver.expect(granted)
    return grant


def test_welcome_says_how_blocks_travel(make_pair):
    for ours, theirs, shared in (("auto", {}, True), ("tcp", {}, False), ("auto", {"segment": ""}, False)):
        channel = greet(make_pair(transport=ours), **theirs)
        assert answers(channel) == [Welcome(shared)]


@pytest.mark.parametrize("changes", [{"compatibility": "other"}, {"block_bytes": BLOCK_BYTES * 2}])
def test_incompatible_peers_are_sent_away(pair, changes):
    channel = greet(pair, **changes)
    assert isinstance(answers(channel)[0], Goodbye)
    assert channel.failure


def test_shared_memory_only_refuses_what_it_cannot_see(pair):
    channel = greet(pair, host_id="elsewhere")
    assert isinstance(answers(channel)[0], Goodbye)
    assert channel.failure


def test_hello_comes_first_and_once(pair):
    channel = HostileChannel()
    pair.receiver.on_opened(channel)
    grant = expect(pair, (1,))
    for message in (Ping(), Open(grant.session_id, EPOCH), offer_of(pair, grant, [0], [0])):
        with pytest.raises(WireError, match="hello first"):
            pair.receiver.on_message(channel, message)
    with pytest.raises(WireError, match="hello first"):
        pair.receiver.on_payload(channel, offer_of(pair, grant, [0], [0]), BLOCK_BYTES)
    greeted = greet(pair)
    with pytest.raises(WireError, match="Hello"):
        pair.receiver.on_message(greeted, Hello("p", "same", "here", "", 1, 1))


def test_a_silent_stranger_is_dropped(pair):
    channel = HostileChannel()
    pair.receiver.on_opened(channel)
    assert pair.receiver.sweep(HANDSHAKE_TIMEOUT_S) == HANDSHAKE_TIMEOUT_S
    assert channel.failure is None
    pair.receiver.sweep(HANDSHAKE_TIMEOUT_S + 1)
    assert channel.failure


def test_the_whole_way(pair):
    channel, grant = greet(pair), expect(pair, (4, 9))
    answers(channel)
    pair.receiver.on_message(channel, Open(grant.session_id, EPOCH))
    pair.receiver.on_message(channel, offer_of(pair, grant, [1], [6]))
    pair.receiver.on_message(channel, Finish(grant.session_id, EPOCH, (3,)))
    assert answers(channel) == [Missing(grant.session_id, EPOCH, (0,))]
    pair.receiver.on_message(channel, offer_of(pair, grant, [0], [5]))
    assert answers(channel) == [Ack(grant.session_id, EPOCH)]
    assert pair.received == [Arrived(grant.session_id, Tail((3,)))]
    assert np.array_equal(pair.target.data[[4, 9]], pair.source.data[[5, 6]])


@pytest.mark.parametrize("message", ["open", "offer", "finish", "abandon"])
@pytest.mark.parametrize("wrong", ["session", "epoch", "connection", "ended"])
def test_frames_of_strangers_and_zombies_change_nothing(pair, message, wrong):
    channel, grant = greet(pair), expect(pair, (4, 9))
    pair.receiver.on_message(channel, Open(grant.session_id, EPOCH))
    sender = greet(pair) if wrong == "connection" else channel
    session_id = b"?" * 16 if wrong == "session" else grant.session_id
    epoch = EPOCH - 1 if wrong == "epoch" else EPOCH
    if wrong == "ended":
        pair.receiver.forget(grant.session_id)
    answers(sender)
    entries = offer_of(pair, grant, [0, 1], [5, 6]).entries
    before, ends = pair.target.data.copy(), list(pair.received)
    pair.receiver.on_message(
        sender,
        {
            "open": Open(session_id, epoch),
            "offer": Offer(session_id, epoch, False, entries),
            "finish": Finish(session_id, epoch, (1,)),
            "abandon": Abandon(session_id, epoch, "zombie"),
        }[message],
    )
    (answer,) = answers(sender)
    assert isinstance(answer, Reject)
    assert (answer.session_id, answer.epoch) == (session_id, epoch)
    assert np.array_equal(before, pair.target.data)
    assert pair.received == ends
    if wrong != "ended":  # the session itself is unharmed
        pair.receiver.on_message(channel, offer_of(pair, grant, [0, 1], [5, 6]))
        pair.receiver.on_message(channel, Finish(grant.session_id, EPOCH, (1,)))
        assert pair.received == [Arrived(grant.session_id, Tail((1,)))]


@pytest.mark.parametrize("where", ["source_generation", "target_generation"])
def test_another_life_of_a_block_fails_the_session(pair, where):
    channel, grant = greet(pair), expect(pair, (4, 9))
    pair.receiver.on_message(channel, offer_of(pair, grant, [0], [5], **{where: 77}))
    (event,) = pair.received
    assert isinstance(event, IncomingFailed)
    assert "reused" in event.reason
    assert isinstance(answers(channel)[-1], Reject)
    assert pair.receiver._counters.generation_failures == 1


def test_a_block_outside_the_senders_pool_ends_the_connection(pair):
    channel, grant = greet(pair), expect(pair, (4,))
    with pytest.raises(WireError, match="outside"):
        pair.receiver.on_message(channel, offer_of(pair, grant, [0], [0], source_block=NUM_BLOCKS))


def test_a_wrong_digest_leaves_the_fragment_missing(pair):
    channel, grant = greet(pair), expect(pair, (4,))
    pair.receiver.on_message(channel, offer_of(pair, grant, [0], [5], checked=1, digest=1))
    assert pair.receiver._counters.digest_failures == 1
    answers(channel)
    pair.receiver.on_message(channel, Finish(grant.session_id, EPOCH, (3,)))
    assert answers(channel) == [Missing(grant.session_id, EPOCH, (0,))]


def test_pings_renew_only_sessions_of_their_connection(pair):
    ours, theirs = expect(pair, (4,), 2.0), expect(pair, (5,), 2.0)
    first, second = greet(pair), greet(pair)
    pair.receiver.on_message(first, Open(ours.session_id, EPOCH))
    pair.receiver.on_message(second, Open(theirs.session_id, EPOCH))
    pair.now = 1.5
    answers(first)
    pair.receiver.on_message(first, Ping())
    assert answers(first) == [Pong()]
    assert pair.receiver.sweep(2.5) == 2.0
    assert [event.session_id for event in pair.received] == [theirs.session_id]


def test_a_lost_connection_takes_its_sessions_and_no_others(pair):
    ours, theirs, nobodys = (expect(pair, (block,)) for block in (4, 5, 6))
    first, second = greet(pair), greet(pair)
    pair.receiver.on_message(first, Open(ours.session_id, EPOCH))
    pair.receiver.on_message(second, Open(theirs.session_id, EPOCH))
    pair.receiver.on_closed(first, "reset")
    assert pair.received == [IncomingFailed(ours.session_id, "sender lost: reset")]
    pair.receiver.fail_all("the end")
    assert {event.session_id for event in pair.received[1:]} == {theirs.session_id, nobodys.session_id}


def test_forget(pair):
    channel, grant = greet(pair), expect(pair, (4,))
    pair.receiver.on_message(channel, Open(grant.session_id, EPOCH))
    answers(channel)
    pair.receiver.forget(grant.session_id)
    pair.receiver.forget(grant.session_id)
    assert pair.received == [IncomingClosed(grant.session_id)]
    assert answers(channel) == [Reject(grant.session_id, EPOCH, "cancelled by the receiver")]


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_a_peer_with_the_key_but_no_manners(data):
    """Any authentic nonsense either does nothing, fails its session, or ends the connection: never a stray write."""
    from fakes.transfer_pair import Pair

    pair = Pair(transport="shared_memory")
    try:
        fill(pair.target, 2)
        channel, grant = greet(pair), expect(pair, (4, 9))
        before = pair.target.data.copy()
        small = st.integers(0, 40)
        for _ in range(data.draw(st.integers(1, 6))):
            session_id = data.draw(st.sampled_from([grant.session_id, b"?" * 16]))
            epoch = data.draw(st.sampled_from([EPOCH, 0]))
            entries = np.zeros(data.draw(st.integers(1, 3)), OFFER_DTYPE)
            for name in OFFER_DTYPE.names:
                entries[name] = data.draw(st.lists(small, min_size=len(entries), max_size=len(entries)))
            message = data.draw(
                st.sampled_from(
                    [
                        Offer(session_id, epoch, False, entries),
                        Finish(session_id, epoch, (1,)),
                        Ack(session_id, epoch),
                        Missing(session_id, epoch, (0,)),
                        Welcome(True),
                        Ping(),
                        Abandon(session_id, epoch, ""),
                    ]
                )
            )
            try:
                pair.receiver.on_message(channel, message)
            except WireError:
                break
        others = [block for block in range(NUM_BLOCKS) if block not in (4, 9)]
        assert np.array_equal(before[others], pair.target.data[others])
        assert len(pair.received) <= 1
    finally:
        pair.close()
