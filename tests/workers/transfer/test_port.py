"""The promises of `port.py`, kept over a link that delays, reorders, repeats and loses, with cancels at any moment."""

from __future__ import annotations

import hypothesis
import numpy as np
import pytest
from fakes.in_ci import every
from fakes.transfer_pair import BLOCK_BYTES, NUM_BLOCKS, Pair
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from penstock.workers.transfer.landing import copy_runs
from penstock.workers.transfer.port import Arrived, IncomingClosed, IncomingFailed, OutgoingDone, OutgoingFailed, Tail

RELEASED = 0xEE
LEASE_S = 10.0


class SessionMachine(RuleBasedStateMachine):
    """Owns both pools as the engines would: a block is reused as soon as the port says that it may be."""

    @initialize(transport=st.sampled_from(["tcp", "shared_memory"]), digest=st.sampled_from(["off", "full"]))
    def set_up(self, transport: str, digest: str) -> None:
        # Without digests nothing but the protocol itself keeps wrong bytes out, so most is found there.
        self.pair = Pair(transport=transport, digest=digest)
        self.pair.target.data[:] = RELEASED
        self.free_source, self.free_target = list(range(NUM_BLOCKS)), list(range(NUM_BLOCKS))
        self.content: dict[bytes, np.ndarray] = {}
        self.sources: dict[bytes, list[int]] = {}
        self.targets: dict[bytes, list[int]] = {}
        self.unoffered: dict[bytes, list[int]] = {}
        self.ended_out: set[bytes] = set()
        self.ended_in: set[bytes] = set()
        self.epoch = 0

    # --- the engines ------------------------------------------------------------------------------------------------

    @precondition(lambda self: len(self.free_source) >= 4 and len(self.free_target) >= 4)
    @rule(count=st.integers(0, 4), complete=st.booleans())
    def grant(self, count: int, complete: bool) -> None:
        targets = [self.free_target.pop(0) for _ in range(count)]
        sources = [self.free_source.pop(0) for _ in range(count)]
        self.epoch += 1
        self.pair.target.generations[targets] += 1
        self.pair.source.generations[sources] += 1
        content = np.random.default_rng(self.epoch).integers(0, 256, (count, BLOCK_BYTES), np.uint8)
        self.pair.source.data[sources] = content
        session_id = self.pair.begin(tuple(targets), LEASE_S).session_id
        self.content[session_id], self.sources[session_id] = content, sources
        self.targets[session_id], self.unoffered[session_id] = targets, list(range(count))
        if complete:
            self.offer_some(session_id, count)

    def sending(self) -> list[bytes]:
        return [session_id for session_id in self.sources if session_id not in self.ended_out]

    def expecting(self) -> list[bytes]:
        return [session_id for session_id in self.targets if session_id not in self.ended_in]

    @precondition(lambda self: self.sending())
    @rule(data=st.data(), count=st.integers(1, 4))
    def offer(self, data: st.DataObject, count: int) -> None:
        session_id = data.draw(st.sampled_from(self.sending()))
        self.offer_some(session_id, count)

    def offer_some(self, session_id: bytes, count: int) -> None:
        chosen, self.unoffered[session_id] = self.unoffered[session_id][:count], self.unoffered[session_id][count:]
        self.pair.sender.offer(session_id, [(i, self.sources[session_id][i]) for i in chosen])
        if not self.unoffered[session_id]:
            self.pair.sender.finish(session_id, Tail((len(chosen), 5)))
        self.take_events()

    # --- the link ---------------------------------------------------------------------------------------------------

    def can_deliver(self) -> bool:
        return bool(self.pair.link.sender_end.outbox) and not self.pair.link.landing_pending

    @precondition(can_deliver)
    @rule(data=st.data(), keep=st.booleans(), hold=st.booleans())
    def deliver(self, data: st.DataObject, keep: bool, hold: bool) -> None:
        link = self.pair.link
        link.deliver_to_receiver(data.draw(st.integers(0, len(link.sender_end.outbox) - 1)), keep=keep, hold=hold)
        self.take_events()

    @precondition(lambda self: self.pair.link.landing_pending)
    @rule()
    def land(self) -> None:
        self.pair.link.land()
        self.take_events()

    @precondition(lambda self: self.pair.link.receiver_end.outbox)
    @rule(data=st.data(), keep=st.booleans())
    def answer(self, data: st.DataObject, keep: bool) -> None:
        link = self.pair.link
        link.deliver_to_sender(data.draw(st.integers(0, len(link.receiver_end.outbox) - 1)), keep=keep)
        self.take_events()

    @rule()
    def good_moment(self) -> None:
        self.pair.link.deliver_all()
        self.take_events()

    @rule(data=st.data(), kind=st.sampled_from(["abandon", "forget", "lose", "wait"]))
    def trouble(self, data: st.DataObject, kind: str) -> None:
        """One rule for all of it, so that most steps make progress."""
        outbox = self.pair.link.sender_end.outbox
        if kind == "abandon" and self.sending():
            self.pair.sender.abandon(data.draw(st.sampled_from(self.sending())), "changed my mind")
        elif kind == "forget" and self.expecting():
            self.pair.receiver.forget(data.draw(st.sampled_from(self.expecting())))
        elif kind == "lose" and outbox:
            del outbox[data.draw(st.integers(0, len(outbox) - 1))]
        elif kind == "wait":
            self.pass_time(data.draw(st.sampled_from([0.5, 3.0, LEASE_S])))
        self.take_events()

    def pass_time(self, seconds: float) -> None:
        self.pair.now += seconds
        self.pair.receiver.sweep(self.pair.now)
        self.pair.sender.sweep(self.pair.now)

    # --- what must hold ---------------------------------------------------------------------------------------------

    def take_events(self) -> None:
        for event in self.pair.received:
            assert isinstance(event, (Arrived, IncomingFailed, IncomingClosed))
            assert event.session_id not in self.ended_in, "a second end"
            self.ended_in.add(event.session_id)
            targets = self.targets[event.session_id]
            if isinstance(event, Arrived):
                assert np.array_equal(self.pair.target.data[targets], self.content[event.session_id])
                assert event.tail.tokens[-1] == 5
                assert not self.unoffered[event.session_id]
            self.pair.target.generations[targets] += 1
            self.pair.target.data[targets] = RELEASED
            self.free_target += targets
        for event in self.pair.sent:
            assert isinstance(event, (OutgoingDone, OutgoingFailed))
            assert event.session_id not in self.ended_out, "a second end"
            self.ended_out.add(event.session_id)
            if isinstance(event, OutgoingDone):
                assert event.session_id in self.ended_in
            sources = self.sources[event.session_id]
            self.pair.source.generations[sources] += 1
            self.pair.source.data[sources] ^= 0x55
            self.free_source += sources
        self.pair.received.clear()
        self.pair.sent.clear()

    @invariant()
    def released_blocks_are_never_written(self) -> None:
        if hasattr(self, "pair"):
            assert (self.pair.target.data[self.free_target] == RELEASED).all()

    @invariant()
    def sessions_add_up(self) -> None:
        if hasattr(self, "pair"):
            sender, receiver = self.pair.sender._counters, self.pair.receiver._counters
            assert sender.open_sessions == len(self.sources) - len(self.ended_out)
            assert receiver.open_sessions == len(self.targets) - len(self.ended_in)

    def teardown(self) -> None:
        if not hasattr(self, "pair"):
            return
        try:
            for _ in range(3):
                self.pass_time(LEASE_S)
                self.take_events()
            assert self.ended_in == set(self.targets)
            assert self.ended_out == set(self.sources)
            self.released_blocks_are_never_written()
        finally:
            self.pair.close()


SessionMachine.TestCase.settings = hypothesis.settings(deadline=None, max_examples=150, stateful_step_count=40)
TestSessions = SessionMachine.TestCase


@pytest.mark.parametrize("transport", ["tcp", "shared_memory"])
@pytest.mark.parametrize("blocks", [(), (3,), (9, 2, 30, 4)])
def test_a_good_link_delivers(make_pair, transport, blocks):
    pair = make_pair(transport=transport)
    grant = pair.begin(blocks)
    pair.sender.offer(grant.session_id, [(i, 20 - i) for i in range(len(blocks))])
    pair.sender.finish(grant.session_id, Tail((11,)))
    pair.link.deliver_all()
    assert pair.received == [Arrived(grant.session_id, Tail((11,)))]
    assert pair.sent == [OutgoingDone(grant.session_id)]
    assert np.array_equal(pair.target.data[list(blocks)], pair.source.data[[20 - i for i in range(len(blocks))]])


def _copy_unchecked(landing, segment, verify):
    if landing.host is not None:
        copy_runs(landing.host.runs, segment.read([row[2] for row in landing.rows]).runs)
    landing.intact = [True] * len(landing.rows)
    return True


def _break(monkeypatch, where, name, broken):
    monkeypatch.setattr(f"penstock.workers.transfer.{where}.{name}", broken)


def land_after_the_end(pair):
    """Both blocks' bytes are on their way when the receiver gives the session up and reuses them."""
    pair.target.data[:] = RELEASED
    grant = pair.begin((3, 4))
    pair.sender.offer(grant.session_id, [(0, 20), (1, 19)])
    while not pair.link.landing_pending:
        pair.link.deliver_to_receiver(0, hold=True)
        while pair.link.receiver_end.outbox:
            pair.link.deliver_to_sender(0)
    pair.receiver.forget(grant.session_id)
    assert pair.received == [IncomingClosed(grant.session_id)]
    pair.link.land()
    assert (pair.target.data[[3, 4]] == RELEASED).all()


def test_bytes_that_land_after_the_end_are_dropped(make_pair):
    land_after_the_end(make_pair(transport="tcp", digest="off"))


def test_that_notices_writes_after_the_end(monkeypatch, make_pair):
    """Two guards stand there: who asks sees that the session ended, and its memory is given back."""
    _break(monkeypatch, "landing", "BlockLanding.open", property(lambda self: self.delivery is not None))
    _break(monkeypatch, "landing", "BlockLanding.release", lambda self: None)
    with pytest.raises(AssertionError):
        land_after_the_end(make_pair(transport="tcp", digest="off"))


@pytest.mark.parametrize("defect", every(2, ["no source check", "reads after the end"]))
def test_the_machine_notices_defects(monkeypatch, defect):
    """The test of the test: each defect breaks a promise, and the machine finds it."""
    if defect == "reads after the end":
        monkeypatch.setattr("fakes.hostile_link.HostileChannel.scrub", lambda self, session_id: None)
    else:
        _break(monkeypatch, "receiver", "copy_blocks", _copy_unchecked)
    options = hypothesis.settings(
        SessionMachine.TestCase.settings,
        max_examples=1500,
        database=None,
        derandomize=True,
        report_multiple_bugs=False,
        phases=[hypothesis.Phase.generate],
    )
    with pytest.raises(AssertionError):
        run_state_machine_as_test(SessionMachine, settings=options)
