"""A lane does what it is asked in order, on its own thread, and says once that it has failed."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable

import pytest
import torch

from penstock.workers.errors import GroupError
from penstock.workers.transfer.lane import Lane


class Pair:
    """Notes what it is asked; blocks in `receive` until `arrive` or `abort`."""

    def __init__(self) -> None:
        self.sent: list[int] = []
        self.come = threading.Semaphore(0)
        self.ended = threading.Event()

    def send(self, frame: torch.Tensor) -> None:
        self.sent.append(int(frame[0]))

    def receive(self, frame: torch.Tensor) -> None:
        self.come.acquire()
        if self.ended.is_set():
            raise GroupError("receive was ended")
        frame.fill_(9)

    def abort(self) -> None:
        self.ended.set()
        self.come.release()


class Thread:
    """The transfer thread: what was posted runs when the test says so."""

    def __init__(self) -> None:
        self.posted: queue.Queue[Callable[[], None]] = queue.Queue()

    def turn(self) -> None:
        self.posted.get(timeout=5)()


@pytest.fixture
def made():
    pair, thread, reasons = Pair(), Thread(), []
    lane = Lane("test", lambda: pair, thread.posted.put, reasons.append)
    yield lane, pair, thread, reasons
    lane.close()
    lane.join(5)
    assert not lane.alive


def frame(number: int) -> torch.Tensor:
    return torch.full((4,), number, dtype=torch.uint8)


def test_frames_go_in_order_and_are_told_on_the_transfer_thread(made) -> None:
    lane, pair, thread, reasons = made
    done: list[int] = []
    for number in range(5):
        lane.send(frame(number), lambda number=number: done.append(number))
    assert lane.in_flight == 5
    for _ in range(5):
        thread.turn()
    assert pair.sent == done == [0, 1, 2, 3, 4]
    assert (lane.in_flight, reasons) == (0, [])


def test_a_received_frame_is_full_when_it_is_told(made) -> None:
    lane, pair, thread, _ = made
    target, done = frame(0), []
    lane.receive(target, lambda: done.append(target.tolist()))
    pair.come.release()
    thread.turn()
    assert done == [[9, 9, 9, 9]]


def test_an_error_is_told_once_and_nothing_after_it(made) -> None:
    lane, pair, thread, reasons = made
    done: list[int] = []
    lane.receive(frame(0), lambda: done.append(0))
    lane.receive(frame(0), lambda: done.append(1))
    pair.abort()
    thread.turn()
    assert reasons == ["receive was ended"]
    assert thread.posted.empty()
    assert done == []


def test_close_ends_what_waits_and_is_silent(made) -> None:
    lane, pair, thread, reasons = made
    lane.receive(frame(0), lambda: reasons.append("landed"))
    lane.send(frame(1), lambda: reasons.append("sent"))
    until = time.monotonic() + 20
    while lane._pair is None and time.monotonic() < until:
        time.sleep(0.001)
    lane.close()
    lane.join(5)
    while not thread.posted.empty():
        thread.turn()
    assert pair.ended.is_set()
    assert reasons == []


def test_peers_that_do_not_meet() -> None:
    def meet():
        raise GroupError("nobody came")

    thread, reasons = Thread(), []
    lane = Lane("test", meet, thread.posted.put, reasons.append)
    lane.send(frame(1), lambda: reasons.append("sent"))
    thread.turn()
    assert reasons == ["nobody came"]
    lane.join(5)
    assert not lane.alive


def test_closed_before_the_peers_have_met() -> None:
    gate, pair, thread = threading.Event(), Pair(), Thread()
    lane = Lane("test", lambda: gate.wait(5) and pair, thread.posted.put, lambda _: None)
    lane.close()
    gate.set()
    lane.join(5)
    assert pair.ended.is_set()
