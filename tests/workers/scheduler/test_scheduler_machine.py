"""The whole scheduler under random requests, steps, transfers, cancels and failures (hypothesis).

Blocks hold real content (fakes.content_runner): a peer writes granted blocks late and in pieces, also after a cancel,
and reads offered ones until the end; idle ones may go to tiers whose threads turn at any moment. Steps run one at a
time, or on a device that is still busy with one when the next is planned, and computes at the last moment. Checked
after every rule: integrity, block conservation, one terminal event per key, right tokens at the right indices, step
budget, and that no decode-ready sequence is skipped while memory allows.
"""

import tempfile
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

import numpy as np
from fakes.content_runner import GARBAGE, ContentRunner, expected_tokens, next_token, slot_values
from fakes.late_device import LateDevice
from fakes.manual_tiers import ManualTiers
from fakes.scheduler_stand import held_blocks
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from penstock.workers.kv.banks import make_banks
from penstock.workers.kv.layout import KVLayout
from penstock.workers.kv.prefix_cache import chain_digests
from penstock.workers.protocol import EndReason, FailureCode, GenerateRequest, SamplingParams
from penstock.workers.scheduler import native_rows
from penstock.workers.scheduler.events import (
    EndedEvent,
    GrantedEvent,
    PreemptedEvent,
    QueuedEvent,
    RefusedEvent,
    StartedEvent,
)
from penstock.workers.scheduler.scheduler import Scheduler, SequenceKey, Work
from penstock.workers.scheduler.table import State
from penstock.workers.settings import SchedulerSettings

BLOCK = 4
MAX_LEN = 64


@dataclass
class Job:
    """What the test knows about one submitted key."""

    work: Work
    request: GenerateRequest
    expected: list[int]  # all generated tokens of the request, those emitted before included
    sends_kv: bool = False
    first_block: int = 0
    produced: list[int] = field(default_factory=list)
    started: bool = False
    queued: bool = False
    grant: GrantedEvent | None = None
    offered: dict[int, int] = field(default_factory=dict)
    terminal: str | None = None  # the one way in which the key ended
    sending: bool = False  # blocks offered, and the transfer not over
    preemptions: int = 0
    bank: int | None = None  # where it must be

    @property
    def context(self) -> list[int]:
        return [*self.request.prompt, *self.request.emitted]


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(data=st.data())
    def start(self, data):
        blocks = data.draw(st.integers(6, 24), label="blocks")
        self.layout = KVLayout(1, 1, 1, BLOCK, "float32")
        count = data.draw(st.sampled_from([1, 1, 1, 2, 3]), label="banks")
        self.generations = np.zeros(count * blocks, np.uint64)
        caching = data.draw(st.sampled_from([True, True, False]), label="caching")
        self.banks = make_banks(count, blocks, self.generations, prefix_caching=caching)
        self.settings = SchedulerSettings(
            max_num_seqs=data.draw(st.integers(2, 6), label="max_num_seqs"),
            max_num_batched_tokens=data.draw(st.sampled_from([3, 8, 16, 64]), label="budget"),
            long_prefill_token_threshold=data.draw(st.sampled_from([0, 3]), label="threshold"),
            max_model_len=MAX_LEN,
            max_waiting=data.draw(st.sampled_from([2, 8, 8]), label="max_waiting"),
            reserve_tokens=data.draw(st.sampled_from([0, 0, 4, 100]), label="reserve"),
            max_preemptions=data.draw(st.integers(0, 3), label="max_preemptions"),
            watermark=data.draw(st.sampled_from([0.0, 0.1]), label="watermark"),
        )
        self.runner = ContentRunner(count * blocks, BLOCK)
        self.tiers = None
        below = None
        if caching and count == 1 and data.draw(st.booleans(), label="tiers"):
            host = data.draw(st.sampled_from([2, 8, 100]), label="host blocks")
            disk = data.draw(st.sampled_from([0, 10, 100]), label="disk blocks")
            self.folder = tempfile.TemporaryDirectory()
            self.tiers = ManualTiers(
                self.runner, self.generations, host, (Path(self.folder.name), disk) if disk else None
            )
            patience = data.draw(st.sampled_from([0.05, 1.0, 1000.0]), label="patience")
            below = (self.tiers.tiers, lambda tokens: patience)
        compiled = data.draw(st.booleans(), label="compiled")
        with nullcontext() if compiled else patch.object(native_rows, "load", return_value=None):
            self.scheduler = Scheduler(self.settings, self.layout, *self.banks, tiers=below)
        self.device = LateDevice(self.runner.run)
        self.flight = []
        self.now = 0.0
        self.serial = 0
        self.jobs: dict[SequenceKey, Job] = {}
        self.quarantined: dict[SequenceKey, GrantedEvent] = {}

    # --- what routers do ---

    @rule(data=st.data(), count=st.integers(1, 5))
    def submit(self, data, count):
        for _ in range(count):
            self.submit_one(data)

    def submit_one(self, data):
        work = data.draw(st.sampled_from([*Work, Work.GENERATE]), label="work")
        family = data.draw(st.sampled_from([0, 0, 0, 1, 2]), label="family")
        length = data.draw(st.sampled_from([4, 8, 8, 12, 16]) | st.integers(1, 40), label="length")
        output = data.draw(st.integers(1, 24), label="output")
        emitted = data.draw(st.sampled_from([0, 0, 0, 1, 4]), label="emitted")
        prompt = [(family * 7 + i * i) % 50 for i in range(length)]
        stops = (family,)
        expected = expected_tokens(prompt, output, stops)
        emitted = min(emitted, len(expected) - 1)
        sends_kv = work is Work.PREFILL and data.draw(st.booleans(), label="sends_kv")
        request = GenerateRequest(
            "r",
            tuple(prompt),
            SamplingParams(max_tokens=output, stop_token_ids=stops, seed=family),
            emitted=tuple(expected[:emitted]),
            prefix_root=bytes([family]) * 32,
            prefix_digests=chain_digests(bytes([family]) * 32, prompt, BLOCK) if length % 2 else b"",
            cache_prefix=data.draw(st.sampled_from([True, True, False]), label="cache_prefix"),
            priority=data.draw(st.integers(0, 1), label="priority"),
            queue_timeout_s=data.draw(st.sampled_from([5.0, 1000.0]), label="timeout"),
        )
        first = data.draw(st.integers(0, self.layout.blocks_for(length + emitted))) if sends_kv else 0
        self.serial += 1
        key = SequenceKey(data.draw(st.sampled_from(["a", "b"])), self.serial, 0)
        self.jobs[key] = Job(work, request, expected, sends_kv, first)
        bank = self.scheduler.bank_for(request) if sends_kv else None
        self.jobs[key].bank = bank
        self.scheduler.submit(key, work, request, self.now, sends_kv=sends_kv, first_block=first, bank=bank)
        self.take_events()

    def live(self) -> list[SequenceKey]:
        return [key for key, job in self.jobs.items() if job.terminal is None]

    def cancel_key(self, key: SequenceKey):
        job = self.jobs[key]
        self.scheduler.cancel(key, self.now)
        if job.terminal is None:
            self.note_cancelled(key)

    def note_cancelled(self, key: SequenceKey):
        job = self.jobs[key]
        job.terminal = "cancelled"
        if job.grant is not None and job.grant.blocks:
            self.quarantined[key] = job.grant
        job.grant = None
        job.sending = bool(job.offered)

    @precondition(lambda self: self.jobs)
    @rule(data=st.data(), sure=st.sampled_from([False] * 3 + [True]))
    def cancel(self, data, sure):
        if sure:
            self.cancel_key(data.draw(st.sampled_from(list(self.jobs))))

    @rule(router=st.sampled_from(["a", "b"]), sure=st.sampled_from([False] * 7 + [True]))
    def cancel_router(self, router, sure):
        if not sure:
            return
        mine = [key for key in self.live() if key.router_id == router]
        assert set(self.scheduler.cancel_router(router, self.now)) == set(mine)
        for key in mine:
            self.note_cancelled(key)

    @rule(seconds=st.sampled_from([0.1, 3.0]))
    def wait(self, seconds):
        self.now += seconds

    # --- what tiers do ---

    @precondition(lambda self: self.tiers is not None)
    @rule(name=st.sampled_from(["kv-host", "kv-host", "kv-read", "kv-write"]), count=st.integers(1, 8))
    def tiers_work(self, name, count):
        """Late, in any order of the threads, and perhaps after all who waited are gone."""
        for _ in range(count):
            self.tiers.work(name)

    @precondition(lambda self: self.tiers is not None)
    @rule()
    def tiers_catch_up(self):
        self.tiers.work_all()

    # --- what peers do ---

    def granted(self) -> list[SequenceKey]:
        return [key for key in self.live() if self.jobs[key].grant is not None]

    @precondition(lambda self: self.granted())
    @rule(data=st.data())
    def transfer_arrives(self, data):
        key = data.draw(st.sampled_from(self.granted()))
        job = self.jobs[key]
        grant, context = job.grant, job.context
        assert grant is not None
        assert tuple(self.generations[list(grant.blocks)].tolist()) == grant.generations
        assert {block // self.banks[0].pool.num_blocks for block in grant.blocks} <= {grant.bank}
        for index, block in enumerate(grant.blocks, start=grant.first_block):
            part = context[index * BLOCK : (index + 1) * BLOCK]
            self.runner.blocks[block, : len(part)] = slot_values(part, index * BLOCK)
        count = data.draw(st.integers(0, 3), label="first tokens")
        tokens = job.expected[len(job.request.emitted) :][:count]
        job.grant = None
        job.produced.extend(tokens)
        self.scheduler.kv_arrived(key, tuple(tokens), self.now)
        self.take_events()

    @precondition(lambda self: self.granted())
    @rule(data=st.data(), closed=st.booleans())
    def transfer_fails(self, data, closed):
        key = data.draw(st.sampled_from(self.granted()))
        self.jobs[key].grant = None
        (self.scheduler.kv_closed if closed else self.scheduler.kv_failed)(key, self.now)
        self.take_events()
        assert self.jobs[key].terminal == FailureCode.TRANSFER_FAILED

    @precondition(lambda self: self.quarantined)
    @rule(data=st.data(), how=st.sampled_from(["write", "closed", "failed", "arrived"]))
    def cancelled_transfer_goes_on(self, data, how):
        key = data.draw(st.sampled_from(sorted(self.quarantined, key=lambda key: key.slot)))
        if how == "write":
            self.runner.blocks[list(self.quarantined[key].blocks)] = GARBAGE
            return
        del self.quarantined[key]
        if how == "arrived":
            self.scheduler.kv_arrived(key, (1,), self.now)
        else:
            (self.scheduler.kv_closed if how == "closed" else self.scheduler.kv_failed)(key, self.now)
        assert not self.scheduler.take_events()

    @precondition(lambda self: any(job.sending for job in self.jobs.values()))
    @rule(data=st.data())
    def peer_has_read(self, data):
        key = data.draw(st.sampled_from([key for key, job in self.jobs.items() if job.sending]))
        job = self.jobs[key]
        for fragment, block in job.offered.items():
            index = fragment + job.first_block
            part = job.context[index * BLOCK : (index + 1) * BLOCK]
            assert self.runner.blocks[block, : len(part)].tolist() == slot_values(part, index * BLOCK).tolist()
        job.sending = False
        was_running = job.terminal is None
        self.scheduler.kv_sent(key, self.now)
        self.take_events()
        if was_running:
            assert job.terminal == FailureCode.TRANSFER_FAILED

    # --- steps ---

    @rule(count=st.integers(1, 12))
    def steps(self, count):
        for _ in range(count):
            self.step(fails=False, interrupt=None)
            self.adds_up()

    @rule(data=st.data(), fails=st.sampled_from([False, False, True]))
    def eventful_step(self, data, fails):
        self.step(fails, interrupt=lambda rows: data.draw(st.sampled_from(rows)))

    @rule(turns=st.integers(1, 6), works=st.booleans())
    def overlapped_turns(self, turns, works):
        """As the engine does on a device: start the next step, then wait for the one before. One may stay under way."""
        for _ in range(turns):
            plan = self.scheduler.plan(self.now)
            self.take_events()
            if plan is not None:
                assert plan.follows == bool(self.flight)
                assert 0 < plan.num_tokens <= self.settings.max_num_batched_tokens
                self.flight.append((plan, self.device.start(plan)))
            if works:
                self.device.work()
            if self.flight and (plan is None or len(self.flight) == 2):
                self.land()
            self.adds_up()

    @precondition(lambda self: self.flight)
    @rule(all_fail=st.booleans())
    def steps_under_way_fail(self, all_fail):
        while self.flight:
            plan, _ = self.flight.pop()
            self.device.drop(plan.step)
            for key in self.scheduler.abort_step(plan, self.now):
                self.end(key, "aborted")
                self.jobs[key].sending = bool(self.jobs[key].offered)
            self.adds_up()
            if not all_fail:
                return

    def land(self):
        plan, wait = self.flight.pop(0)
        self.check(self.scheduler.commit(plan, wait(), self.now))
        self.take_events()

    def step(self, fails, interrupt):
        while self.flight:
            self.land()
        table = self.scheduler._table
        ready = {table.sequence_in(slot).key for slot in table.rows_in(State.DECODE).tolist()}
        before = {key: job.preemptions for key, job in self.jobs.items()}
        plan = self.scheduler.plan(self.now)
        self.take_events()
        if plan is None:
            return
        assert 0 < plan.num_tokens <= self.settings.max_num_batched_tokens
        rows = [table.sequence_in(slot).key for slot in plan.slots.tolist()]
        gave_way = {key for key in ready if self.jobs[key].preemptions > before[key]}
        assert set(rows[: plan.num_decode]) == ready - gave_way
        assert not gave_way or min(bank.pool.num_free for bank in self.banks) < len(gave_way) * MAX_LEN
        for row in range(len(rows)):
            held = plan.block_tables[row, : self.layout.blocks_for(int(plan.starts[row]) + 1)]
            places = set((held // self.banks[0].pool.num_blocks).tolist())
            assert len(places) == 1  # a row lives in one bank
            assert self.jobs[rows[row]].bank in (None, *places)
        counts = np.diff(plan.offsets)
        assert (counts[: plan.num_decode] == 1).all()
        if self.settings.long_prefill_token_threshold:
            assert (counts <= self.settings.long_prefill_token_threshold).all()
        for row, key in enumerate(rows):
            known = self.jobs[key].context + self.jobs[key].produced
            fed = plan.token_ids[plan.offsets[row] : plan.offsets[row + 1]].tolist()
            assert fed == known[plan.starts[row] : plan.starts[row] + len(fed)]
        if fails:
            lost = self.scheduler.abort_step(plan, self.now)
            assert set(lost) == set(rows)
            for key in lost:
                self.end(key, "aborted")
                self.jobs[key].sending = bool(self.jobs[key].offered)
            return
        result = self.runner.run(plan)
        if interrupt is not None:
            self.cancel_key(interrupt(rows))
        self.check(self.scheduler.commit(plan, result, self.now))
        self.take_events()

    def check(self, outcome):
        assert len(outcome.logprobs.chosen) == len(outcome.tokens)
        seen = set()
        for row, token in enumerate(outcome.tokens.tolist()):
            router = outcome.router_ids[outcome.router_index[row]]
            key = SequenceKey(router, int(outcome.slots[row]), int(outcome.attempts[row]))
            job = self.jobs[key]
            assert job.terminal is None
            assert key not in seen
            seen.add(key)
            assert outcome.starts[row] == len(job.request.emitted) + len(job.produced)
            assert token == job.expected[outcome.starts[row]]
            job.produced.append(token)
            generated = len(job.request.emitted) + len(job.produced)
            if generated == len(job.expected):
                stopped = token in job.request.sampling.stop_token_ids
                assert outcome.ends[row] == (EndReason.STOP if stopped else EndReason.LENGTH)
                self.end(key, "completed")
            else:
                assert outcome.ends[row] == EndReason.NONE
        self.check_transfers(outcome)

    def check_transfers(self, outcome):
        for key, fragments in outcome.offers:
            job = self.jobs[key]
            for fragment, block in fragments:
                assert fragment not in job.offered
                job.offered[fragment] = block
            job.sending = True
        for key, first_token, end in outcome.sent_tails:
            job = self.jobs[key]
            assert first_token == job.produced[-1] == next_token(job.context)
            if end is EndReason.NONE:
                self.end(key, "sent")
                needed = self.layout.blocks_for(len(job.context)) - job.first_block
                assert sorted(job.offered) == list(range(needed))
                job.sending = True
            else:
                assert job.terminal == "completed"
                job.sending = bool(job.offered)

    def end(self, key: SequenceKey, how: str):
        job = self.jobs[key]
        assert job.terminal is None, f"{key} ended as {job.terminal} and again as {how}"
        job.terminal = how

    def take_events(self):
        for event in self.scheduler.take_events():
            job = self.jobs[event.key]
            assert job.terminal is None, f"{event} after {job.terminal}"
            match event:
                case QueuedEvent():
                    assert not job.queued
                    job.queued = True
                    assert 0 <= event.position < self.settings.max_waiting + self.settings.max_num_seqs
                case GrantedEvent():
                    assert job.work is Work.RESERVE
                    assert not job.started
                    job.started, job.grant = True, event
                    assert event.first_block + len(event.blocks) == self.layout.blocks_for(len(job.context))
                    assert event.cached_tokens == event.first_block * BLOCK
                case StartedEvent():
                    assert job.work is not Work.RESERVE
                    assert not job.started
                    job.started = True
                    assert event.cached_tokens < len(job.context)
                case PreemptedEvent():
                    assert job.started
                    assert not job.sends_kv
                    job.preemptions += 1
                    assert job.preemptions <= self.settings.max_preemptions
                case RefusedEvent():
                    self.end(event.key, event.code)
                    if job.sending and event.code is FailureCode.TRANSFER_FAILED:
                        job.sending = False
                case EndedEvent():
                    assert event.start == len(job.request.emitted)
                    assert list(event.tokens) == job.expected[event.start :]
                    self.end(event.key, "completed")

    @invariant()
    def adds_up(self):
        if not hasattr(self, "banks"):
            return
        self.scheduler.check_integrity()
        stats = self.scheduler.stats()
        for pool, _ in self.banks:
            assert pool.num_free + pool.num_owned + pool.num_quarantined == pool.num_blocks
        assert stats.quarantined_blocks == sum(len(grant.blocks) for grant in self.quarantined.values())
        assert stats.waiting + stats.running == len(self.live()) + len(self.scheduler._roster.under_way.leaving)
        held = set().union(*(held_blocks(*bank) for bank in self.banks))
        assert len(held) == sum(pool.num_owned for pool, _ in self.banks)
        for job in self.jobs.values():
            assert not job.sending or held.issuperset(job.offered.values())

    def teardown(self):
        """Left alone, everything ends: transfers fail, the rest runs dry, and every block is back."""
        if not hasattr(self, "banks"):
            return
        for key in sorted(self.quarantined, key=lambda key: key.slot):
            self.scheduler.kv_closed(key, self.now)
        while self.flight:
            self.land()
        for _ in range(2000):
            for key, job in self.jobs.items():
                if job.grant is not None and job.terminal is None:
                    job.grant = None
                    self.scheduler.kv_failed(key, self.now)
                    self.take_events()
                if job.sending and job.terminal is not None:
                    job.sending = False
                    self.scheduler.kv_sent(key, self.now)
            if self.tiers is not None:
                self.tiers.work_all()
            plan = self.scheduler.plan(self.now)
            self.take_events()
            if not self.live() and plan is None:
                break
            if plan is not None:
                self.check(self.scheduler.commit(plan, self.runner.run(plan), self.now))
                self.take_events()
        assert not self.live(), [self.jobs[key] for key in self.live()]
        self.scheduler.check_integrity()
        for job in self.jobs.values():
            assert job.terminal is not None
        for pool, _ in self.banks:
            assert pool.num_free == pool.num_blocks
        assert not self.scheduler._memory.lingering
        if self.tiers is not None:
            assert not self.scheduler._memory.landings
            self.tiers.tiers.stop()
            self.folder.cleanup()


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(deadline=None, max_examples=100, stateful_step_count=40)
