"""The fault object breaks what it is told to, as often as it is told to, and says so."""

from __future__ import annotations

from penstock.workers.transfer.faults import TransferFaults

BATCH = [(0, 10), (1, 11), (2, 12)]


def test_drop_and_duplicate():
    assert TransferFaults().choose(BATCH) == BATCH
    assert TransferFaults(drop=frozenset({1})).choose(BATCH) == [(0, 10), (2, 12)]
    assert TransferFaults(duplicate=frozenset({1})).choose(BATCH) == [*BATCH, (1, 11)]


def test_times():
    faults = TransferFaults(drop=frozenset({0, 1, 2}), times=2)
    assert faults.choose(BATCH) == [(2, 12)]
    assert faults.choose(BATCH) == BATCH
    assert faults.fired == {"drop": 2}


def test_die_after():
    died = []
    faults = TransferFaults(die_after=5, die=lambda: died.append(True))
    assert faults.room(3) == 3
    faults.left(3)
    assert faults.room(3) == 2
    assert not died
    faults.left(2)
    assert died == [True]
    assert faults.fired == {"die": 1}
