"""Token buckets and leases of one key, on a clock of the test's own."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.cluster.ingress.errors import HttpProblem
from penstock.cluster.ingress.rate_limits import Account, TokenBucket
from penstock.cluster.key_file import KeyEntry

ENTRY = KeyEntry("a", b"", max_open_requests=2, requests_per_minute=3, tokens_per_minute=100)


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def refused(problem: HttpProblem, code: str) -> int:
    assert (problem.status, problem.kind, problem.code) == (429, "rate_limit_exceeded", code)
    return int(dict(problem.headers())[b"retry-after"])


def test_open_requests() -> None:
    account = Account(replace(ENTRY, requests_per_minute=None), Clock())
    with account.lease(), account.lease() as second:
        with pytest.raises(HttpProblem) as over:
            account.lease()
        assert refused(over.value, "concurrency_limit") == 1
        second.end()
        second.end()  # again is harmless
        account.lease().end()
    assert account.open_requests == 0


def test_requests_per_minute() -> None:
    clock = Clock()
    account = Account(ENTRY, clock)
    for _ in range(3):
        account.lease().end()
    with pytest.raises(HttpProblem) as over:
        account.lease()
    assert refused(over.value, "requests_per_minute") == 20  # a third of a minute
    assert account.open_requests == 0
    clock.now += 19.9
    with pytest.raises(HttpProblem):
        account.lease()
    clock.now += 0.2
    account.lease().end()


def test_tokens_per_minute() -> None:
    clock = Clock()
    lease = Account(ENTRY, clock).lease()
    lease.charge_prompt(60)
    lease.charge_generated(60)  # it owes 20 now
    with pytest.raises(HttpProblem) as over:
        lease.charge_prompt(1)
    assert refused(over.value, "tokens_per_minute") == 13  # (20 + 1) / 100 of a minute, rounded up
    clock.now += 36
    lease.charge_prompt(40)
    clock.now += 60
    lease.charge_prompt(5000)  # larger than the bucket: once it is full
    with pytest.raises(HttpProblem) as long:
        lease.charge_prompt(1)
    assert refused(long.value, "tokens_per_minute") > 2900


def test_a_share_of_the_limits() -> None:
    """Four ingresses, four quarters; never less than one."""
    account = Account(KeyEntry("a", b"", max_open_requests=2, requests_per_minute=40), Clock(), share=0.25)
    lease = account.lease()
    with pytest.raises(HttpProblem):
        account.lease()
    lease.end()
    for _ in range(9):
        account.lease().end()
    with pytest.raises(HttpProblem):
        account.lease()


def test_no_limits() -> None:
    account = Account(KeyEntry("a", b""), Clock())
    leases = [account.lease() for _ in range(1000)]
    for lease in leases:
        lease.charge_prompt(10**9)
        lease.charge_generated(10**9)


@settings(deadline=None, max_examples=100)
@given(
    capacity=st.integers(1, 1000),
    steps=st.lists(st.tuples(st.floats(0, 100), st.integers(1, 1500)), max_size=40),
)
def test_a_bucket_gives_no_more_than_its_rate(capacity: int, steps: list[tuple[float, int]]) -> None:
    """Over any time, what was taken after asking is at most what was there, what came in, and one last request; and
    whoever waits as long as he was told is served."""
    now, taken, largest = 0.0, 0.0, 0
    bucket = TokenBucket(capacity, now)
    for pause, amount in steps:
        now += pause
        wait = bucket.wait_s(amount, now)
        assert wait >= 0
        if wait:
            now += wait * (1 + 1e-9) + 1e-6
            assert bucket.wait_s(amount, now) == 0
        bucket.take(amount, now)
        taken += amount
        largest = max(largest, amount)
        assert taken <= capacity + now * capacity / 60 * (1 + 1e-6) + largest + 1e-6


def test_a_clock_that_goes_back_gives_nothing() -> None:
    bucket = TokenBucket(60, 100.0)
    bucket.take(60, 100.0)
    assert bucket.wait_s(60, 50.0) == pytest.approx(60)
    assert bucket.wait_s(60, 130.0) == pytest.approx(30)
