"""Sessions and keys: each event of the transfer side reaches the scheduler once, under the right key."""

import dataclasses
from typing import Any

import pytest

from penstock.workers.handover import GranterIdentity, HandOver
from penstock.workers.protocol import EndReason, FailureCode, Grant
from penstock.workers.scheduler.events import GrantedEvent, Offer, SentTail, SequenceKey
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

KEY = SequenceKey("r", 3, 1)
OTHER = SequenceKey("r", 4, 1)
GRANT = Grant(b"peer-session-id.", "d", 1, "d:1", "host", 0, (5, 6), (1, 1), 2.0, "same")


class Calls:
    """Transfer port and scheduler in one: writes down what it is asked."""

    address = "w:1"

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.events: list[TransferEvent] = []

    def poll(self) -> list[TransferEvent]:
        events, self.events = self.events, []
        return events

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: self.calls.append((name, *arguments))


@pytest.fixture
def calls() -> Calls:
    return Calls()


@pytest.fixture
def handover(calls: Calls) -> HandOver:
    return HandOver(calls, GranterIdentity("w", 7, "host", "same", 2.0), lambda: b"own-session-id..")  # type: ignore[arg-type]


def tell(handover: HandOver, calls: Calls, event: TransferEvent) -> list[tuple[Any, ...]]:
    calls.calls.clear()
    calls.events.append(event)
    handover.poll(calls, 9.0)  # type: ignore[arg-type]
    return calls.calls


def test_a_grant_is_expected_before_it_exists_for_anyone(handover: HandOver, calls: Calls) -> None:
    grant = handover.grant(GrantedEvent(KEY, 2, (8, 9), (4, 5), 32))
    assert calls.calls == [("expect", Incoming(b"own-session-id..", 7, (8, 9), (4, 5), 2.0))]
    assert grant == Grant(b"own-session-id..", "w", 7, "w:1", "host", 2, (8, 9), (4, 5), 2.0, "same")
    assert len(handover) == 1


@pytest.mark.parametrize(
    ("event", "call"),
    [
        (Arrived(b"own-session-id..", Tail((11,))), ("kv_arrived", KEY, (11,), 9.0)),
        (IncomingFailed(b"own-session-id..", "lost"), ("kv_failed", KEY, 9.0, FailureCode.TRANSFER_FAILED)),
        (
            IncomingFailed(b"own-session-id..", "wrong", TransferCause.MISMATCHED),
            ("kv_failed", KEY, 9.0, FailureCode.KV_DAMAGED),
        ),
        (IncomingClosed(b"own-session-id.."), ("kv_closed", KEY, 9.0)),
    ],
)
def test_final_events_of_an_incoming_session(
    handover: HandOver, calls: Calls, event: TransferEvent, call: tuple[Any, ...]
) -> None:
    handover.grant(GrantedEvent(KEY, 0, (8,), (4,), 0))
    assert tell(handover, calls, event) == [call]
    assert len(handover) == 0
    assert tell(handover, calls, event) == []  # a second one belongs to nobody


@pytest.mark.parametrize("event", [OutgoingDone(GRANT.session_id), OutgoingFailed(GRANT.session_id, "gone")])
def test_final_events_of_an_outgoing_session(handover: HandOver, calls: Calls, event: TransferEvent) -> None:
    assert handover.open(KEY, GRANT)
    assert not handover.open(KEY, GRANT)
    assert problem(handover, OTHER) is FailureCode.BAD_REQUEST
    assert problem(handover, KEY) is None
    assert calls.calls == [("start", GRANT, 0)]
    assert tell(handover, calls, event) == [("kv_sent", KEY, 9.0)]
    assert len(handover) == 0


def test_offers_and_tails_go_to_their_session(handover: HandOver, calls: Calls) -> None:
    handover.open(KEY, GRANT)
    calls.calls.clear()
    offers = [Offer(KEY, [(0, 30)]), Offer(OTHER, [(0, 31)])]
    handover.offer(offers, [SentTail(KEY, 12, EndReason.NONE), SentTail(OTHER, 13, EndReason.NONE)])
    handover.offer([], [SentTail(KEY, 12, EndReason.STOP)])
    offered, finished, abandoned = calls.calls
    assert offered == ("offer", GRANT.session_id, [(0, 30)])
    assert finished == ("finish", GRANT.session_id, Tail((12,)))
    assert abandoned[:2] == ("abandon", GRANT.session_id)


def problem(handover: HandOver, key: SequenceKey, grant: Grant = GRANT) -> FailureCode | None:
    found = handover.problem_with(key, grant)
    return None if found is None else found[0]


def test_a_dropped_key_lingers_until_the_final_event(handover: HandOver, calls: Calls) -> None:
    handover.grant(GrantedEvent(KEY, 0, (8,), (4,), 0))
    handover.open(OTHER, GRANT)
    calls.calls.clear()
    for key in (KEY, OTHER, SequenceKey("r", 5, 1)):
        handover.drop(key, "cancelled")
    assert calls.calls == [("forget", b"own-session-id.."), ("abandon", GRANT.session_id, "cancelled")]
    lingering = [problem(handover, SequenceKey("r", slot, 1)) for slot in (3, 4)]
    assert lingering == [FailureCode.QUEUE_FULL] * 2
    assert problem(handover, SequenceKey("r", 5, 1)) is not FailureCode.QUEUE_FULL
    tell(handover, calls, IncomingClosed(b"own-session-id.."))
    tell(handover, calls, OutgoingFailed(GRANT.session_id, "abandoned"))
    assert problem(handover, KEY) is None
    assert problem(handover, OTHER) is None
    foreign = dataclasses.replace(GRANT, compatibility="another layout")
    assert problem(handover, KEY, foreign) is FailureCode.INCOMPATIBLE
    assert handover.problem_with(KEY, None) is None
