"""Counters add up."""

from __future__ import annotations

from penstock.workers.transfer.endpoint import TransferCounters


def test_open_sessions():
    counters = TransferCounters(
        incoming_started=9,
        incoming_arrived=3,
        incoming_failed=2,
        incoming_closed=1,
        outgoing_started=5,
        outgoing_done=2,
        outgoing_failed=1,
    )
    assert counters.open_sessions == 3 + 2
