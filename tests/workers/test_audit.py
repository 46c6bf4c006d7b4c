"""The worker's log of ended attempts: numbered, told page by page, bounded, and honest about what it forgot."""

from __future__ import annotations

import pytest

from penstock.workers import audit
from penstock.workers.audit import AuditLog
from penstock.workers.protocol import FailureCode
from penstock.workers.scheduler.events import SequenceKey


def log_of(count: int, share: float = 1.0) -> AuditLog:
    log = AuditLog(share)
    end(log, range(count))
    return log


def end(log: AuditLog, numbers: range) -> None:
    for number in numbers:
        key = SequenceKey("router", number, 1)
        log.received(key, str(number))
        log.over(key, FailureCode.CANCELLED)


def read(log: AuditLog, after: int = 0) -> tuple[list[str], int]:
    """All request ids from there on, and how many were missed."""
    names: list[str] = []
    missed = 0
    while True:
        first, page = log.page(after)
        missed += first - after
        names += [attempt.request_id for attempt in page]
        after = first + len(page)
        if after == log.count:
            return names, missed


@pytest.mark.parametrize("count", [0, 1, audit.PAGE - 1, audit.PAGE, audit.PAGE + 1, 3 * audit.PAGE + 7])
def test_pages_give_every_end_once_in_order(count: int) -> None:
    log = log_of(count)
    assert read(log) == ([str(number) for number in range(count)], 0)
    assert all(len(log.page(after)[1]) <= audit.PAGE for after in (0, count // 2, count))


def test_who_asks_again_hears_what_is_new() -> None:
    log = log_of(5)
    end(log, range(5, 8))
    assert read(log, 5) == (["5", "6", "7"], 0)
    assert log.page(8) == (8, ())
    assert log.page(1000) == (8, ())  # as another incarnation's reader would ask: the number tells


def test_what_made_room_is_told_as_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit, "MAX_ENDED", 10)
    log = log_of(25)
    assert read(log) == ([str(number) for number in range(15, 25)], 15)
    assert read(log, 20) == (["20", "21", "22", "23", "24"], 0)


def test_requests_outside_the_sample_are_not_told() -> None:
    assert read(log_of(50, share=0.0)) == ([], 0)
