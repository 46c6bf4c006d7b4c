"""The channel of steps over real sockets: order, shared memory, generations, answers; gaps are refused."""

import os
from collections.abc import Iterator

import numpy as np
import pytest
from fakes.group_links import LinkPairs
from fakes.random_plans import assert_equal, make_plan

from penstock.workers.errors import GroupError, IntegrityError
from penstock.workers.parallel.group_messages import BlocksRenewed, ForgetSession
from penstock.workers.parallel.step_channel import StepReceiver, StepSender
from penstock.workers.parallel.step_ring import RingReader, RingWriter


class Channels:
    def __init__(self) -> None:
        self._pairs = LinkPairs()
        self._ends: list[StepSender | StepReceiver] = []

    def open(self, followers: int, ring_bytes: int = 0) -> tuple[StepSender, list[StepReceiver]]:
        pairs = [self._pairs.pair() for _ in range(followers)]
        ring = RingWriter(ring_bytes, followers) if ring_bytes else None
        receivers = []
        for number, (end, _) in enumerate(pairs):
            reader = None if ring is None else RingReader(os.dup(ring.descriptor), number)
            receivers.append(StepReceiver(end, reader))
        sender = StepSender([mine for _, mine in pairs], ring)
        self._ends += [sender, *receivers]
        return sender, receivers

    def close(self) -> None:
        for end in self._ends:
            end.close()
        self._pairs.close()


@pytest.fixture
def channels() -> Iterator[Channels]:
    made = Channels()
    yield made
    made.close()


@pytest.mark.parametrize("ring_bytes", [0, 1 << 16])
def test_plans_and_messages_come_in_the_order_sent(ring_bytes: int, channels: Channels) -> None:
    sender, receivers = channels.open(3, ring_bytes)
    plans = [make_plan(seed, rows) for seed, rows in enumerate((1, 60, 2, 90, 80))]
    for plan in plans:
        sender.send_plan(plan)
        sender.send(ForgetSession(bytes(16)))
        for receiver in receivers:
            read = receiver.receive()
            assert_equal(plan, read)
            assert receiver.receive() == ForgetSession(bytes(16))
    assert sender.sequence == receivers[0].sequence == 10


def test_a_ring_that_went_around_many_times_never_shows_an_old_plan(channels: Channels) -> None:
    sender, receivers = channels.open(2, 1 << 15)
    for seed in range(60):
        plan = make_plan(seed, 70)
        sender.send_plan(plan)
        for receiver in receivers:
            assert_equal(plan, receiver.receive())


def test_generations_go_before_what_speaks_of_them(channels: Channels) -> None:
    sender, (receiver,) = channels.open(1)
    generations = np.zeros(8, np.uint64)
    sender.announce(generations)
    generations[[2, 5]] += np.uint64(1)
    sender.send_plan(make_plan(1, 2))
    sender.send_plan(make_plan(2, 2))
    renewed = receiver.receive()
    assert isinstance(renewed, BlocksRenewed)
    assert (renewed.blocks.tolist(), renewed.generations.tolist()) == ([2, 5], [1, 1])
    assert_equal(make_plan(1, 2), receiver.receive())
    assert_equal(make_plan(2, 2), receiver.receive())


def test_answers_are_of_this_plan(channels: Channels) -> None:
    sender, receivers = channels.open(2)
    first = sender.send_plan(make_plan(1, 2))
    for number, receiver in enumerate(receivers):
        receiver.receive()
        receiver.answer(b"part %d" % number)
    assert [bytes(part) for part in sender.parts(first)] == [b"part 0", b"part 1"]
    second = sender.send_plan(make_plan(2, 2))
    receivers[0].answer(b"late")  # it has not read the second plan
    with pytest.raises(IntegrityError, match=f"message {first}, not to {second}"):
        sender.parts(second)


def test_the_others_hear_what_one_cannot_be_sent(channels: Channels) -> None:
    sender, receivers = channels.open(3, 1 << 16)
    receivers[1].close()
    for seed in range(40):  # more than the ring holds for a reader that takes nothing
        if seed == 2:
            assert sender.broken == (2,)
            sender.leave_out(2)
            sender.leave_out(2)
        sender.send_plan(make_plan(seed, 80))
        for receiver in (receivers[0], receivers[2]):
            assert_equal(make_plan(seed, 80), receiver.receive())
    receivers[0].answer(b"0")
    receivers[2].answer(b"2")
    assert sender.parts(sender.sequence) == [b"0", b"2"]


def test_shared_memory_that_changed_is_noticed(channels: Channels) -> None:
    sender, (receiver,) = channels.open(1, 1 << 16)
    sender.send_plan(make_plan(1, 80))
    assert sender._ring is not None
    sender._ring._map[4096 + 100] ^= 1
    with pytest.raises(IntegrityError, match="does not hold what was sent"):
        receiver.receive()


def test_a_lost_plan_is_noticed_by_the_next(channels: Channels) -> None:
    sender, (receiver,) = channels.open(1)
    (link,) = sender._links.values()
    whole = link._write
    link._write = lambda data: None  # type: ignore[method-assign]
    sender.send_plan(make_plan(1, 2))
    link._write = whole  # type: ignore[method-assign]
    sender.send_plan(make_plan(2, 2))
    with pytest.raises(IntegrityError, match="frame 2 follows frame 0"):
        receiver.receive()


def test_the_end_reaches_followers(channels: Channels) -> None:
    sender, (receiver,) = channels.open(1, 1 << 16)
    sender.close()
    with pytest.raises(GroupError):
        receiver.receive()
