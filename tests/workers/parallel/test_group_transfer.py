"""A KV session of a group ends once, after every rank, and is whole only if it is on all of them."""

import dataclasses
from typing import Any

import pytest

from penstock.workers.parallel import group_messages as m
from penstock.workers.parallel.group_transfer import GroupRanks, GroupTransfer, event_of, over_of
from penstock.workers.protocol import Grant
from penstock.workers.totals import TransferCause
from penstock.workers.transfer.port import (
    Arrived,
    Incoming,
    IncomingClosed,
    IncomingFailed,
    OutgoingDone,
    OutgoingFailed,
    Tail,
    TransferEvent,
)

SESSION = b"s" * 16
GRANT = Grant(SESSION, "d", 1, "h:1", "host", 0, (5, 6), (1, 1), 2.0, "same", ("h:2", "h:3"))
INCOMING = Incoming(SESSION, 1, (5, 6), (1, 1), 2.0)


class OwnTransfer:
    """Rank 0's transfer engine as a list of what was asked, and events put in by the test."""

    address = "h:1"

    def __init__(self) -> None:
        self.asked: list[tuple[str, Any]] = []
        self.events: list[TransferEvent] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *args: self.asked.append((name, args))

    def poll(self) -> list[TransferEvent]:
        taken, self.events = self.events, []
        return taken


class Stand:
    def __init__(self, width: int = 3) -> None:
        self.own = OwnTransfer()
        self.sent: list[m.GroupMessage] = []
        self.group = GroupTransfer(self.own, GroupRanks(width), self.sent.append)  # type: ignore[arg-type]

    def ends(self, rank: int, event: TransferEvent) -> list[TransferEvent]:
        if rank == 0:
            self.own.events.append(event)
        else:
            self.group.heard(rank, over_of(event))
        return self.group.poll()

    @property
    def asked(self) -> list[str]:
        return [name for name, _ in self.own.asked]


def test_what_a_lost_rank_had_part_in_has_failed() -> None:
    """Of a group whose ranks have a bank each; the session of another bank goes on."""
    stand = Stand(1)
    stand.group = GroupTransfer(stand.own, GroupRanks(1, 16), stand.sent.append)  # type: ignore[arg-type]
    sessions = {name: name.encode() * 16 for name in "abcd"}
    stand.group.expect(dataclasses.replace(INCOMING, session_id=sessions["a"], bank=1, blocks=(16, 17)))
    stand.group.expect(dataclasses.replace(INCOMING, session_id=sessions["b"], bank=2, blocks=(32, 33)))
    stand.group.start(dataclasses.replace(GRANT, session_id=sessions["c"]), 1)
    stand.group.lose(1)
    stand.group.start(dataclasses.replace(GRANT, session_id=sessions["d"]), 1)  # asked for before the engine knew
    lost = ("rank 1 is lost", TransferCause.PEER_LOST)
    assert stand.group.poll() == [
        IncomingFailed(sessions["a"], *lost),
        OutgoingFailed(sessions["c"], *lost),
        OutgoingFailed(sessions["d"], *lost),
    ]
    assert stand.group.poll() == []
    whole = Arrived(sessions["b"], Tail((7,)))
    assert stand.ends(2, whole) == [whole]


def test_it_has_arrived_once_it_has_on_every_rank() -> None:
    stand = Stand()
    stand.group.expect(INCOMING)
    assert stand.sent == [m.ExpectSession(0, SESSION, 1, (5, 6), (1, 1), 2.0)]
    whole = Arrived(SESSION, Tail((7,)))
    assert stand.ends(1, Arrived(SESSION, Tail(()))) == []
    assert stand.ends(0, whole) == []
    assert stand.ends(2, Arrived(SESSION, Tail(()))) == [whole]
    assert stand.ends(2, Arrived(SESSION, Tail(()))) == []


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_failing_on_one_rank_fails_it_and_ends_it_on_the_others(failing: int) -> None:
    stand = Stand()
    stand.group.expect(INCOMING)
    failure = IncomingFailed(SESSION, "damaged", TransferCause.DAMAGED)
    others = [rank for rank in range(3) if rank != failing]
    assert stand.ends(others[0], Arrived(SESSION, Tail((7,)))) == []
    assert stand.ends(failing, failure) == []
    assert m.ForgetSession(SESSION) in stand.sent
    assert "forget" in stand.asked
    (event,) = stand.ends(others[1], IncomingClosed(SESSION))
    assert event == failure
    assert isinstance(event, IncomingFailed)
    assert event.cause is TransferCause.DAMAGED


def test_forgetting_waits_for_every_rank() -> None:
    stand = Stand()
    stand.group.expect(INCOMING)
    stand.group.forget(SESSION)
    assert stand.ends(0, IncomingClosed(SESSION)) == []
    assert stand.ends(1, IncomingClosed(SESSION)) == []
    assert stand.ends(2, IncomingClosed(SESSION)) == [IncomingClosed(SESSION)]
    stand.group.forget(SESSION)
    assert stand.asked.count("forget") == 1


def test_sending_speaks_to_every_rank() -> None:
    stand = Stand(2)
    stand.group.start(GRANT)
    stand.group.offer(SESSION, [(0, 11), (1, 12)])
    stand.group.finish(SESSION, Tail((9,)))
    assert stand.sent == [
        m.StartSession(0, SESSION, "d", 1, ("h:1", "h:2", "h:3"), "host", 0, (5, 6), (1, 1), 2.0, "same"),
        m.OfferBlocks(SESSION, (0, 1), (11, 12)),
        m.FinishSession(SESSION, (9,)),
    ]
    assert stand.asked == ["start", "offer", "finish"]
    assert stand.ends(0, OutgoingDone(SESSION)) == []
    assert stand.ends(1, OutgoingDone(SESSION)) == [OutgoingDone(SESSION)]


def test_sending_that_fails_on_a_follower_is_abandoned_everywhere() -> None:
    stand = Stand(2)
    stand.group.start(GRANT)
    assert stand.ends(1, OutgoingFailed(SESSION, "gone", TransferCause.PEER_LOST)) == []
    assert stand.sent[-1] == m.AbandonSession(SESSION, "it failed on rank 1")
    (event,) = stand.ends(0, OutgoingFailed(SESSION, "abandoned", TransferCause.ABANDONED))
    assert event == OutgoingFailed(SESSION, "gone", TransferCause.PEER_LOST)


def test_unknown_sessions_are_ignored() -> None:
    stand = Stand()
    stand.group.forget(SESSION)
    stand.group.abandon(SESSION, "x")
    stand.group.offer(SESSION, [(0, 1)])
    stand.group.finish(SESSION, Tail(()))
    assert (stand.sent, stand.asked) == ([], [])
    assert stand.ends(1, OutgoingDone(SESSION)) == []


def test_events_travel() -> None:
    for event in (
        Arrived(SESSION, Tail(())),
        IncomingClosed(SESSION),
        OutgoingDone(SESSION),
        IncomingFailed(SESSION, "why", TransferCause.LEASE_EXPIRED),
        OutgoingFailed(SESSION, "why", TransferCause.REFUSED),
    ):
        assert event_of(over_of(event)) == event
    unknown = event_of(m.SessionOver(SESSION, "Nonsense", "", "nonsense"))
    assert isinstance(unknown, IncomingFailed)


def test_a_session_of_a_bank_concerns_its_ranks_only() -> None:
    """Four ranks in two banks of 100 blocks: ranks 2 and 3 have the second bank, under ids of their own."""
    own, sent = OwnTransfer(), []
    group = GroupTransfer(own, GroupRanks(2, 100), sent.append)  # type: ignore[arg-type]
    group.expect(Incoming(SESSION, 1, (105, 199), (1, 1), 2.0, bank=1))
    assert sent == [m.ExpectSession(1, SESSION, 1, (5, 99), (1, 1), 2.0)]
    assert own.asked == []  # rank 0 has no part in it
    group.heard(3, over_of(Arrived(SESSION, Tail((8,)))))
    assert group.poll() == []
    group.heard(0, over_of(Arrived(SESSION, Tail((8,)))))  # of nobody's concern
    group.heard(2, over_of(Arrived(SESSION, Tail((7,)))))
    assert group.poll() == [Arrived(SESSION, Tail((7,)))]


def test_blocks_offered_out_of_a_bank() -> None:
    own, sent = OwnTransfer(), []
    group = GroupTransfer(own, GroupRanks(1, 100), sent.append)  # type: ignore[arg-type]
    group.start(GRANT, 2)
    group.offer(SESSION, [(0, 203), (1, 210)])
    assert sent[1] == m.OfferBlocks(SESSION, (0, 1), (3, 10))
    assert [name for name, _ in own.asked] == ["offer"]  # which finds the session unknown
    group.heard(2, over_of(OutgoingDone(SESSION)))
    assert group.poll() == [OutgoingDone(SESSION)]
