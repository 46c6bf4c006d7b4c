"""All takers together stay below the rate, and below a quarter of it while KV moves."""

import pytest

from penstock.workers.weights.pace import Pace


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.mark.parametrize(("busy", "expected_s"), [(False, 1.0), (True, 4.0)])
def test_the_rate_holds(busy: bool, expected_s: float) -> None:
    clock = Clock()
    pace = Pace(1000.0, lambda: busy, clock, clock.sleep)
    for _ in range(101):
        pace.take(10)
    assert clock.now - 100.0 == pytest.approx(expected_s, rel=0.1)


def test_what_was_not_used_is_not_saved_up() -> None:
    clock = Clock()
    pace = Pace(1000.0, clock=clock, sleep=clock.sleep)
    pace.take(1000)
    clock.now += 3600.0
    began = clock.now
    for _ in range(11):
        pace.take(100)
    assert clock.now - began == pytest.approx(0.95)
