"""Banks are lost in the middle of anything: their sequences are computed again elsewhere, no token changes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from fakes.content_runner import GARBAGE, ContentRunner, expected_tokens
from fakes.scheduler_stand import BLOCK, make_request
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.workers.errors import IntegrityError
from penstock.workers.kv.banks import BankedCaches, make_banks
from penstock.workers.kv.layout import KVLayout
from penstock.workers.protocol import EndReason, FailureCode
from penstock.workers.scheduler.events import GrantedEvent, PreemptedEvent, RefusedEvent, SchedulerEvent
from penstock.workers.scheduler.scheduler import Scheduler, SequenceKey, Work
from penstock.workers.settings import SchedulerSettings

BANKS, SIZE = 4, 20


class Worker:
    """A scheduler over several banks, and a runner over all of them that sees what must not be read."""

    def __init__(self, **limits: Any) -> None:
        defaults = {"max_num_seqs": 8, "max_num_batched_tokens": 24, "max_model_len": 72, "watermark": 0.0}
        self.banks = make_banks(BANKS, SIZE, np.zeros(BANKS * SIZE, np.uint64), prefix_caching=True)
        layout = KVLayout(1, 1, 1, BLOCK, "float32")
        self.scheduler = Scheduler(SchedulerSettings(**{**defaults, **limits}), layout, *self.banks)
        self.runner = ContentRunner(BANKS * SIZE, BLOCK)
        self.produced: dict[int, list[int]] = {}
        self.ended: set[int] = set()
        self.events: list[SchedulerEvent] = []

    def submit(self, slot: int, prompt: list[int], output: int, work: Work = Work.GENERATE, **options: Any) -> None:
        self.produced[slot] = []
        request = make_request(prompt, output, prefix_root=bytes(32))
        self.scheduler.submit(SequenceKey("a", slot, 0), work, request, 0.0, **options)

    def step(self, *lost: int) -> bool:
        """One step; when banks are lost in it, nothing of it counts."""
        plan = self.scheduler.plan(0.0)
        self.events += self.scheduler.take_events()
        if plan is None:
            return False
        result = self.runner.run(plan)
        if lost:
            self.lose(*lost, plan=plan)
            return True
        outcome = self.scheduler.commit(plan, result, 0.0)
        self.scheduler.check_integrity()
        for row, token in enumerate(outcome.tokens.tolist()):
            self.produced[int(outcome.slots[row])].append(token)
            if outcome.ends[row] != EndReason.NONE:
                self.ended.add(int(outcome.slots[row]))
        return True

    def lose(self, *banks: int, plan: Any = None) -> None:
        for bank in banks:
            self.runner.blocks[bank * SIZE : (bank + 1) * SIZE] = GARBAGE
        self.scheduler.lose_banks(banks, plan)
        self.events += self.scheduler.take_events()
        self.scheduler.check_integrity()

    def rows_in(self, bank: int) -> int:
        table = self.scheduler._table
        return sum(each is not None and each.bank == bank for each in table.sequences)


@given(data=st.data())
@settings(deadline=None, max_examples=60)
def test_no_token_changes_whenever_banks_are_lost(data: st.DataObject) -> None:
    worker, expected = Worker(), {}
    left = set(range(BANKS))
    for slot in range(data.draw(st.integers(2, 9))):
        family, length = data.draw(st.integers(0, 1)), data.draw(st.sampled_from([1, 4, 8, 8, 16, 30]))
        prompt, output = [(family * 7 + i * i) % 50 for i in range(length)], data.draw(st.integers(1, 14))
        expected[slot] = expected_tokens(prompt, output)
        worker.submit(slot, prompt, output)
        for _ in range(data.draw(st.integers(0, 3))):
            worker.step()
        if len(left) > 1 and data.draw(st.booleans()):
            lost = data.draw(st.sampled_from(sorted(left - {0})))
            left.discard(lost)
            if not (data.draw(st.booleans()) and worker.step(lost)):
                worker.lose(lost)
    for _ in range(1000):
        if not worker.step():
            break
    assert worker.produced == expected
    assert worker.ended == set(expected)
    stats = worker.scheduler.stats()
    assert stats.lost_blocks == (BANKS - len(left)) * SIZE
    assert stats.free_blocks == len(left) * SIZE
    for number, (pool, cache) in enumerate(worker.banks):
        assert (pool.num_owned, pool.num_quarantined) == (0, 0)
        assert number in left or (cache is not None and len(cache) == 0)


def test_others_lose_nothing_and_nothing_goes_where_a_bank_was() -> None:
    worker = Worker()
    for slot in range(BANKS):
        worker.submit(slot, [slot + 1] * 6, 10)
    worker.step()
    assert [worker.rows_in(bank) for bank in range(BANKS)] == [1] * BANKS
    worker.step(2)
    assert len([event for event in worker.events if isinstance(event, PreemptedEvent)]) == 1
    for slot in range(BANKS, 8):
        worker.submit(slot, [slot + 1] * 6, 10)
    while worker.step():
        assert worker.rows_in(2) == 0
    assert worker.produced == {slot: expected_tokens([slot + 1] * 6, 10) for slot in range(8)}
    assert worker.scheduler.bank_for(make_request([1, 2, 3])) != 2


def test_routers_hear_that_what_was_cached_there_is_not() -> None:
    worker = Worker()
    worker.submit(0, list(range(16)), 4)
    while worker.step():
        pass
    caches = BankedCaches([bank.cache for bank in worker.banks if bank.cache is not None])
    stored, _ = caches.take_events()
    assert len(stored) > 0
    worker.lose(*range(BANKS))
    _, evicted = caches.take_events()
    assert sorted(evicted) == sorted(stored)


def test_a_row_that_was_to_begin_with_a_copy_begins_again() -> None:
    """Its bank stays, but the copy was part of the step that failed."""
    worker = Worker()
    prompt = list(range(8))
    worker.submit(0, prompt, 3)
    while worker.step():
        pass
    home = next(number for number, bank in enumerate(worker.banks) if bank.cache is not None and len(bank.cache))
    worker.submit(1, prompt, 3)
    plan = worker.scheduler.plan(0.0)
    assert plan is not None
    assert len(plan.copies) == 1
    worker.lose((home + 1) % BANKS, plan=plan)  # before anything of it ran
    while worker.step():
        pass
    assert worker.produced[1] == expected_tokens(prompt, 3)
    assert worker.scheduler.stats().preemptions == 0


@pytest.mark.parametrize("admitted", [True, False])
def test_what_a_peer_writes_or_reads_is_refused(admitted: bool) -> None:
    worker = Worker()
    worker.submit(0, [1] * 9, 5, Work.RESERVE)
    assert not worker.step()
    (grant,) = [event for event in worker.events if isinstance(event, GrantedEvent)]
    for slot, bank in ((1, grant.bank), (2, (grant.bank + 1) % BANKS)):
        worker.submit(slot, [slot] * 30, 1, Work.PREFILL, sends_kv=True, bank=bank)
    if admitted:
        worker.step()
    worker.lose(grant.bank)
    refused = {event.key.slot: event.code for event in worker.events if isinstance(event, RefusedEvent)}
    assert refused == {0: FailureCode.TRANSFER_FAILED, 1: FailureCode.TRANSFER_FAILED}
    pool = worker.banks[grant.bank].pool
    assert pool.num_free == SIZE


def test_only_the_step_under_way_can_be_taken_back() -> None:
    worker = Worker()
    worker.submit(0, [1] * 6, 4)
    plan = worker.scheduler.plan(0.0)
    assert plan is not None
    worker.scheduler.commit(plan, worker.runner.run(plan), 0.0)
    with pytest.raises(IntegrityError, match="not the step that was planned last"):
        worker.scheduler.lose_banks((1,), plan)
