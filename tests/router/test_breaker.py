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


def test_after_a_pause_one_trial_is_let_through() -> None:
    breaker = Breaker(2, 1.0, 8.0)
    breaker.failed(0.0)
    breaker.failed(0.0)
    assert breaker.closed(1.0)
    breaker.tried(1.0)
    assert not breaker.closed(1.5), "the trial is under way"
    breaker.passed()
    assert breaker.closed(1.5)
    breaker.failed(1.6)
    assert not breaker.closed(3.5), "one failure suffices, and the pause has doubled"
    assert breaker.closed(3.7)


def test_a_failed_trial_opens_it_for_longer_and_a_silent_one_for_a_pause() -> None:
    breaker = Breaker(1, 1.0, 8.0)
    breaker.failed(0.0)
    breaker.tried(1.0)
    breaker.failed(1.1)
    assert not breaker.closed(3.0)
    assert breaker.closed(3.2)
    breaker.tried(3.2)
    assert not breaker.closed(5.0)
    assert breaker.closed(8.0), "nothing was heard of the trial"


def test_work_sent_to_a_sound_worker_is_no_trial() -> None:
    breaker = Breaker(2, 1.0, 8.0)
    breaker.failed(0.0)
    breaker.tried(0.1)
    assert breaker.closed(0.1)
