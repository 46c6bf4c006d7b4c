"""Order, deadlines and bounds of the waiting queue."""

import numpy as np
import pytest
from fakes.scheduler_stand import make_request

from penstock.workers.scheduler.events import SequenceKey, Work
from penstock.workers.scheduler.sequence import Sequence
from penstock.workers.scheduler.waiting import AdmissionPace, WaitingQueue


def sequence(arrival: int, priority: int = 0, work: Work = Work.GENERATE, deadline: float = 100.0) -> Sequence:
    request = make_request([1, 2, 3], priority=priority)
    return Sequence(SequenceKey("a", arrival, 0), work, request, arrival, 0, deadline, np.array([1, 2, 3], np.int32))


def test_preempted_first_then_priority_then_arrival():
    queue = WaitingQueue()
    late, early, urgent, preempted = sequence(3), sequence(1), sequence(2, priority=-1), sequence(4, priority=5)
    preempted.preemptions = 1
    for entry in (late, early, urgent, preempted):
        queue.push(entry)
    assert queue.entries() == (preempted, urgent, early, late)
    assert [queue.position(entry) for entry in (preempted, late)] == [0, 3]
    queue.remove(urgent)
    assert queue.entries() == (preempted, early, late)
    assert len(queue) == 3


def test_first_passes_over_keys_still_closing():
    queue = WaitingQueue()
    assert queue.first(()) is None
    one, two = sequence(1), sequence(2)
    queue.push(one)
    queue.push(two)
    assert queue.first(()) is one
    assert queue.first({one.key}) is two
    assert queue.first({one.key, two.key}) is None


def test_only_those_never_admitted_expire():
    queue = WaitingQueue()
    short, long, resumed = sequence(1, deadline=5.0), sequence(2, deadline=9.0), sequence(3, deadline=1.0)
    resumed.started = True
    assert queue.next_deadline is None
    for entry in (short, long, resumed):
        queue.push(entry)
    assert queue.next_deadline == 5.0
    assert queue.expired(4.9) == []
    assert queue.expired(5.0) == [short]
    queue.remove(short)
    assert queue.next_deadline == 9.0
    assert queue.expired(20.0) == [long]


def test_reservations_bring_no_prefill_tokens():
    queue = WaitingQueue()
    entries = [sequence(1), sequence(2, work=Work.RESERVE), sequence(3, work=Work.PREFILL)]
    for entry in entries:
        queue.push(entry)
    assert queue.prefill_tokens == 6
    for entry in entries:
        queue.remove(entry)
    assert queue.prefill_tokens == 0


def test_pace_is_bounded_and_follows_admissions():
    pace = AdmissionPace()
    assert pace.wait_s(1000) == 1.0
    for now in np.arange(0.0, 50.0, 0.5):
        pace.note(float(now))
    assert pace.wait_s(20) == pytest.approx(10.0, rel=0.01)
    assert pace.wait_s(10_000) == 60.0
