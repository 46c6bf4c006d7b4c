"""What a turn of the step loop costs, in calls of functions, which are counted exactly: no clock is asked."""

import sys
import threading
from collections.abc import Callable

import numpy as np
import pytest

from penstock.workers.engine import Engine, EngineParts
from penstock.workers.handover import GranterIdentity, HandOver
from penstock.workers.inbox import Attached
from penstock.workers.kv.banks import Bank
from penstock.workers.kv.block_pool import BlockPool
from penstock.workers.kv.layout import KVLayout
from penstock.workers.kv.prefix_cache import PrefixCache, chain_digests
from penstock.workers.kv_feed import KVEventFeed
from penstock.workers.outbox import Outbox
from penstock.workers.protocol import Generate, GenerateRequest, SamplingParams, TokenFrame
from penstock.workers.scheduler.plan import StepPlan, StepResult
from penstock.workers.scheduler.scheduler import Scheduler
from penstock.workers.settings import SchedulerSettings
from penstock.workers.wire import decode_to_router, decode_to_worker, encode

BLOCK = 16
STEADY_CALLS = 260  # of a turn in which nobody comes, goes or fills a block; 190 when this was written
TURNOVER_CALLS = 600  # of one in which one sequence comes and another goes; 410 when this was written


class Runner:
    layout = KVLayout(1, 1, 1, BLOCK, "float32")
    vocab_size = 1000

    def run(self, plan: StepPlan) -> StepResult:
        return StepResult(np.full(len(plan.sample_rows), 7, np.int32))


class Transfer:
    address = "nowhere:0"

    def poll(self):
        return []


class Worker:
    """An engine around a runner that computes nothing, on a clock that stands still, with one router."""

    def __init__(self, sequences: int) -> None:
        pool = BlockPool(20_000)
        cache = PrefixCache(pool)
        settings = SchedulerSettings(
            max_num_seqs=sequences, max_num_batched_tokens=8192, max_model_len=4096, reserve_tokens=0
        )
        self.scheduler = Scheduler(settings, Runner.layout, Bank(pool, cache))
        self.outbox = Outbox(lambda: None)
        handover = HandOver(Transfer(), GranterIdentity("w", 1, "h", "c", 1.0), lambda: bytes(16))
        parts = EngineParts(self.scheduler, Runner(), handover, KVEventFeed(cache, self), self)
        self.engine = Engine(parts, lambda: 0.0, threading.Event())
        self.engine.post("router", Attached(10.0))
        self.serial = 0

    def send(self, router_id, message) -> None:
        self.outbox.push(message)

    def broadcast(self, message) -> None:
        self.outbox.push(message)

    def submit(self, prompt: int, output: int, document: int = 0) -> None:
        """`document`: leading tokens that are the same in all prompts."""
        self.serial += 1
        tokens = (*(index % 900 for index in range(document)), *[900 + self.serial % 100] * (prompt - document))
        digests = chain_digests(bytes(32), tokens, BLOCK)
        request = GenerateRequest("r", tokens, SamplingParams(output), prefix_digests=digests)
        self.engine.post("router", decode_to_worker(encode(Generate(self.serial, 0, request))))

    def turn(self) -> list[bytes]:
        self.engine.step()
        return self.outbox.take()


def calls(action: Callable[[], object]) -> int:
    """Calls of Python and C functions that the action makes in this thread."""
    count = 0

    def note(_frame, event, _argument) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        action()
    finally:
        sys.setprofile(None)
    return count


def steady(sequences: int) -> Worker:
    """A worker whose sequences all decode, their next blocks some steps away."""
    worker = Worker(sequences)
    for _ in range(sequences):
        worker.submit(20, 1000)
    for _ in range(3):
        worker.turn()
    return worker


def test_a_decode_step_costs_the_same_calls_for_many_sequences_as_for_few():
    few, many = steady(8), steady(256)
    counts = [calls(few.turn), calls(many.turn)]
    assert counts[0] == counts[1] <= STEADY_CALLS
    frames = [message for message in map(decode_to_router, many.turn()) if isinstance(message, TokenFrame)]
    assert [len(frame.slots) for frame in frames] == [256]


def test_filling_blocks_costs_no_calls_per_sequence():
    few, many = steady(8), steady(256)
    counts = [[calls(worker.turn) for _ in range(BLOCK)] for worker in (few, many)]
    assert counts[0] == counts[1]
    assert max(counts[0]) > min(counts[0]), "no step of these grew anything"


@pytest.mark.parametrize("cached", [True, False], ids=["cached", "computed"])
def test_coming_and_going_cost_the_same_calls_for_long_contexts_as_for_short(cached: bool):
    counts = []
    for prompt in (160, 2400):
        worker = steady(64)
        document = prompt - 64 if cached else 0
        worker.scheduler.cancel_router("router", 0.0)
        for _ in range(2):
            worker.submit(prompt, 40, document)
        worker.submit(prompt, 2, document)
        worker.turn()
        worker.submit(prompt, 40, document)
        counts.append(calls(worker.turn))
        worker.scheduler.check_integrity()
        assert worker.scheduler.stats().running == 3
    assert abs(counts[0] - counts[1]) <= 10
    assert max(counts) <= TURNOVER_CALLS
