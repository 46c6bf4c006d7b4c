"""Retries keep to a tenth of first attempts; those beyond wait their turn, and nobody for ever."""

from __future__ import annotations

import pytest

from penstock.router.retry_budget import RetryBudget


def test_a_burst_is_free_and_then_retries_keep_to_their_share() -> None:
    budget = RetryBudget(share=0.1, per_s=0.001, burst=4.0)
    assert [budget.spend(0.0) for _ in range(4)] == [0.0] * 4
    for _ in range(20):
        budget.earn()
    waits = [budget.spend(0.0) for _ in range(3)]
    assert waits[:2] == pytest.approx([0.0, 0.0])
    assert waits[2] == pytest.approx(5.0)


def test_who_waits_is_paced_by_the_clock() -> None:
    budget = RetryBudget(share=0.1, per_s=2.0, burst=1.0)
    assert [budget.spend(0.0) for _ in range(4)] == pytest.approx([0.0, 0.5, 1.0, 1.5])
    assert budget.spend(2.0) == pytest.approx(0.0)
    assert max(budget.spend(2.0) for _ in range(1000)) <= 5.0


def test_what_is_earned_in_quiet_times_is_bounded() -> None:
    budget = RetryBudget(share=0.1, per_s=1.0, burst=3.0)
    for _ in range(1000):
        budget.earn()
    assert [budget.spend(1e6) > 0 for _ in range(4)] == [False, False, False, True]
