"""The circuit breaker opens after failures in a row, for longer each time, and forgets after a success."""

from penstock.router.breaker import Breaker


def test_it_opens_and_gives_one_trial() -> None:
    breaker = Breaker(failures=3, open_s=1.0, max_s=4.0)
    for _ in range(2):
        breaker.failed(10.0)
    assert breaker.closed(10.0)
    breaker.failed(10.0)
    assert not breaker.closed(10.5)
    assert breaker.closed(11.0)
    breaker.failed(11.0)
    assert not breaker.closed(12.5)
    assert breaker.closed(13.0)


def test_many_failures_of_one_incident_count_once() -> None:
    breaker = Breaker(failures=1, open_s=1.0, max_s=8.0)
    for _ in range(100):
        breaker.failed(0.0)
    assert breaker.closed(1.0)


def test_the_pause_is_bounded_and_a_success_forgets() -> None:
    breaker = Breaker(failures=1, open_s=1.0, max_s=4.0)
    now = 0.0
    for _ in range(10):
        breaker.failed(now)
        now += 100
    breaker.failed(now)
    assert not breaker.closed(now + 3.9)
    assert breaker.closed(now + 4.0)
    breaker.succeeded()
    breaker.failed(now)
    assert breaker.closed(now + 1.0)
