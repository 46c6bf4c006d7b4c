"""The worker's counters: sizes fall into their buckets, transfers are timed from the first block, causes are kept."""

from __future__ import annotations

import numpy as np

from penstock.workers.observation import Observation
from penstock.workers.protocol import FailureCode, Load
from penstock.workers.scheduler.events import RefusedEvent, SequenceKey, StartedEvent, StepOutcome
from penstock.workers.totals import STEP_TOKENS_UP_TO, TRANSFER_S_UP_TO, TransferCause, WorkerTotals
from penstock.workers.wire import decode_to_router, encode

KEY = SequenceKey("router", 1, 1)


def outcome(tokens: int) -> StepOutcome:
    zeros = np.zeros(tokens, np.int32)
    return StepOutcome(
        ("router",),
        zeros,
        zeros.view(np.uint32),
        zeros.astype(np.uint16),
        zeros.view(np.uint32),
        zeros,
        zeros.astype(np.uint8),
    )


def test_steps() -> None:
    observation = Observation()
    for tokens in (1, 8, 9, 1_000_000):
        observation.stepped(tokens, outcome(1), 1.0, 1.5)
    totals = observation.totals(reserved=3)
    assert totals.reserved == 3
    assert totals.step_tokens == 1_000_018
    assert totals.step_s == 2.0
    assert totals.generated_tokens == 4
    counts = dict(zip((*STEP_TOKENS_UP_TO, None), totals.steps_by_tokens, strict=True))
    assert (counts[1], counts[8], counts[16], counts[None]) == (1, 1, 1, 1)  # a bound belongs to its bucket


def test_cache_hits_count_once_per_start() -> None:
    observation = Observation()
    observation.happened(StartedEvent(KEY, 32, 100))
    observation.happened(RefusedEvent(KEY, FailureCode.DEADLINE, "late"))
    totals = observation.totals()
    assert (totals.prompt_tokens, totals.cached_tokens) == (100, 32)


def test_transfers() -> None:
    now = 10.0
    observation = Observation(block_bytes=100, clock=lambda: now)
    observation.sending(KEY, 5)
    now = 20.0
    observation.offered(KEY)
    now = 20.5
    observation.offered(KEY)  # later blocks do not move the beginning
    observation.sent(KEY, 20.02)
    failed = SequenceKey("router", 2, 1)
    observation.sending(failed, 7)
    observation.sent(failed, 21.0, TransferCause.LEASE_EXPIRED)
    observation.arrived(KEY, 22.0)
    observation.arrived(KEY, 22.0, TransferCause.DAMAGED)
    observation.lease_expired()
    totals = observation.totals()
    counts = dict(zip((*TRANSFER_S_UP_TO, None), totals.transfers_by_s, strict=True))
    assert counts[0.03] == sum(counts.values()) == 1
    assert round(totals.transfer_s, 6) == 0.02
    assert totals.transfer_bytes == 500
    assert totals.transfers_received == 1
    assert totals.router_leases_expired == 1
    failures = dict(zip(TransferCause, totals.transfer_failures, strict=True))
    assert failures[TransferCause.LEASE_EXPIRED] == failures[TransferCause.DAMAGED] == 1
    assert sum(failures.values()) == 2


def test_totals_travel_in_the_heartbeat() -> None:
    observation = Observation(block_bytes=1)
    observation.stepped(7, outcome(2), 0.0, 0.25)
    load = Load(1, 0.0, 0.1, 1, 2, 3, 4, 5, 6, 7, 8, False, observation.totals(4))
    assert decode_to_router(encode(load)) == load
    assert decode_to_router(encode(Load(1, 0.0, 0.1, 1, 2, 3, 4, 5, 6, 7, 8, False))).totals == WorkerTotals()  # type: ignore[union-attr]
