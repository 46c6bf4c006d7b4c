"""Fixtures of the transfer tests: pairs over a hostile link, and whole engines; both are closed after each test."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from fakes.fault_plan import Fault, FaultPlan
from fakes.transfer_pair import BLOCK_BYTES, NUM_BLOCKS, Pair, Worker, fill

from penstock.workers import fault_points
from penstock.workers.kv.storage import KVStorage
from penstock.workers.settings import TransferSettings


@pytest.fixture
def make_pair() -> Iterator[Callable[..., Pair]]:
    made: list[Pair] = []

    def make(**options: object) -> Pair:
        made.append(Pair(**options))
        return made[-1]

    yield make
    for pair in made:
        pair.close()


@pytest.fixture
def make_worker() -> Iterator[Callable[..., Worker]]:
    made: list[Worker] = []

    def make(name: str, *, num_blocks: int = NUM_BLOCKS, block_bytes: int = BLOCK_BYTES, **options: object) -> Worker:
        settings = options.pop("settings", None) or TransferSettings(transport=options.pop("transport", "auto"))
        made.append(Worker(name, KVStorage.create(num_blocks, block_bytes), settings, **options))
        fill(made[-1].storage, len(made))
        return made[-1]

    yield make
    for worker in made:
        worker.close()


@pytest.fixture
def break_by() -> Iterator[Callable[..., FaultPlan]]:
    """Break this process by these faults until the test is over."""

    def arm(*faults: Fault) -> FaultPlan:
        plan = FaultPlan(faults)
        fault_points.plan = plan
        return plan

    yield arm
    fault_points.plan = None
