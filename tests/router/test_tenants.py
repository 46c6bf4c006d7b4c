"""Fairness counters against the bounds of the method: Sheng et al., "Fairness in Serving LLMs" (OSDI 2024)."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest

from penstock.router.tenants import TenantCounters

INPUT, OUTPUT = 1.0, 2.0
LONGEST_INPUT, LONGEST_OUTPUT, SLOTS = 60, 40, 10


@dataclass
class Job:
    tenant: str
    inputs: int
    outputs: int
    done: int = 0


class Engine:
    """A batch of `SLOTS` requests, one token each per step, fed by the counters; work-conserving, no preemption."""

    def __init__(self, weights: dict[str, float] | None = None, lift: bool = True) -> None:
        self.counters = TenantCounters(weights or {})
        self.lift = lift
        self.lines: dict[str, list[Job]] = {}
        self.running: list[Job] = []
        self.service: dict[str, float] = {}

    def arrive(self, job: Job) -> None:
        if job.tenant not in self.lines:
            if self.lift:
                self.counters.joined_line(job.tenant, self.lines)
            self.lines[job.tenant] = []
        self.lines[job.tenant].append(job)

    def step(self) -> None:
        while self.lines and len(self.running) < SLOTS:
            tenant = self.counters.next_tenant(self.lines)
            job = self.lines[tenant].pop(0)
            if not self.lines[tenant]:
                del self.lines[tenant]
                if not self.lines:
                    self.counters.left_line(tenant)
            self.charge(tenant, INPUT * job.inputs)
            self.running.append(job)
        for job in self.running:
            job.done += 1
            self.charge(job.tenant, OUTPUT)
        self.running = [job for job in self.running if job.done < job.outputs]

    def charge(self, tenant: str, tokens: float) -> None:
        self.counters.charge(tenant, tokens)
        self.service[tenant] = self.service.get(tenant, 0.0) + tokens


BOUND = max(INPUT * LONGEST_INPUT, OUTPUT * SLOTS * (LONGEST_INPUT + LONGEST_OUTPUT))


@pytest.mark.parametrize("seed", range(5))
def test_counters_of_those_who_wait_stay_close(seed: int) -> None:
    rng = random.Random(seed)
    engine = Engine()
    for step in range(1500):
        for tenant, rate in (("flood", 0.6), ("steady", 0.2), ("bursty", 0.9 if step // 200 % 2 else 0.0)):
            if rng.random() < rate:
                engine.arrive(Job(tenant, rng.randint(1, LONGEST_INPUT), rng.randint(1, LONGEST_OUTPUT)))
        engine.step()
        waiting = [engine.counters.service(tenant) for tenant in engine.lines]
        if waiting:
            assert max(waiting) - min(waiting) <= BOUND


def test_two_backlogged_tenants_get_the_same_whatever_they_ask() -> None:
    engine = Engine()
    for _ in range(4000):
        engine.arrive(Job("small", 2, 5))
        engine.arrive(Job("large", 60, 40))
    for _ in range(2000):
        engine.step()
    assert abs(engine.service["small"] - engine.service["large"]) <= 2 * BOUND
    assert engine.service["small"] / engine.service["large"] == pytest.approx(1.0, abs=0.05)


def test_weights_divide_the_service() -> None:
    engine = Engine({"gold": 3.0, "iron": 1.0})
    for _ in range(4000):
        engine.arrive(Job("gold", 10, 10))
        engine.arrive(Job("iron", 10, 10))
    for _ in range(2000):
        engine.step()
    assert engine.service["gold"] / engine.service["iron"] == pytest.approx(3.0, rel=0.05)


@pytest.mark.parametrize("lift", [True, False])
def test_idling_earns_no_credit(lift: bool) -> None:
    """Without the lift the one who comes late takes everything until it has caught up: the test can fail."""
    engine = Engine(lift=lift)
    for _ in range(20_000):
        engine.arrive(Job("early", 10, 10))
    for _ in range(3000):
        engine.step()
    before = dict(engine.service)
    for _ in range(5000):
        engine.arrive(Job("late", 10, 10))
    for _ in range(300):
        engine.step()
    gained = {tenant: engine.service.get(tenant, 0.0) - before.get(tenant, 0.0) for tenant in ("early", "late")}
    fair = gained["late"] / gained["early"] == pytest.approx(1.0, abs=0.3) if gained["early"] else False
    assert fair is lift


def test_the_line_that_ran_empty_sets_the_start_of_the_next() -> None:
    counters = TenantCounters({})
    counters.joined_line("a", [])
    counters.charge("a", 500.0)
    counters.left_line("a")
    counters.joined_line("b", [])
    assert counters.service("b") == 500.0


def test_its_size_is_bounded() -> None:
    counters = TenantCounters({}, max_tenants=100)
    for number in range(10_000):
        counters.joined_line(f"t{number}", [])
        counters.charge(f"t{number}", float(number))
    assert len(counters) <= 101
