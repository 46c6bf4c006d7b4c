"""Combined faults, drawn by a seed, under a load of 80 %, for three minutes (thirty with `-m slow`): every law holds.

Rounds of twenty seconds. In each, blocks are dropped, damaged, doubled and late all the time, and two or three things
break besides: workers are killed or stopped, the network between prefill and decode is cut, readers leave, the load
doubles, a worker is drained and replaced. After each round everything comes to rest and is judged by laws L1 to L7; at
the end by L8 too. Memory of this process, where router, client and ledger are, must stay what it was: what is alive of
Python's since the third round, and what the system counts since it had filled up, for the C library keeps what was
freed in between. `-s` prints a line for each round.

`PENSTOCK_SOAK_SEED` draws another one.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from fakes.fault_plan import ALWAYS, Action, Fault, FaultPlan
from fakes.hostile_network import HostileNetwork, hostile_network
from fakes.lawful import Court, lawful
from fakes.oracle_cluster import Pace, oracle_request, oracle_workers

from penstock.router.settings import PlacementSettings, RouterSettings
from penstock.workers.fault_points import Point
from penstock.workers.protocol import GenerateRequest
from penstock.workers.settings import WorkerSettings

SEED = int(os.environ.get("PENSTOCK_SOAK_SEED", "1"))
ROUND_S = 20.0
PREFILL, DECODE = 2, 3
LOAD = 0.8
MEMORY_SHARE = 0.02
WARM_ROUNDS = 3  # until memory counts
FULL_ROUNDS = 30  # until resident memory counts: it fills up more and more slowly
FILLING_SHARE = 0.06  # what it may take on in three minutes, all of which it fills up
PACE = Pace(
    step_s=0.04, max_num_seqs=16, num_blocks=1024, chunk=256, lease_s=1.0, transport="tcp", digest="full"
)  # fmt: skip
MEAN_OUTPUT = 40
CAPACITY = DECODE * PACE.max_num_seqs / (MEAN_OUTPUT * PACE.step_s + 0.1)  # requests/s
ROUTER = RouterSettings(PlacementSettings(local_prefill_tokens=0))
FAULTS = (
    Fault(Point.TRANSFER_SEND, Action.DROP, chance=0.002, times=ALWAYS),
    Fault(Point.TRANSFER_SEND, Action.DUPLICATE, chance=0.005, times=ALWAYS),
    Fault(Point.TRANSFER_LAND, Action.CORRUPT, chance=0.002, times=ALWAYS, byte=None),
    Fault(Point.TRANSFER_ACK, Action.DROP, chance=0.01, times=ALWAYS),
    Fault(Point.FRAME_OUT, Action.DUPLICATE, chance=0.01, times=ALWAYS),
    Fault(Point.KV_PUBLISH, Action.DROP, chance=0.01, times=ALWAYS),
    Fault(Point.STEP_BEGIN, Action.DELAY, chance=0.002, times=ALWAYS, seconds=0.2),
)


class Unrest:
    """What breaks in one round, and what was broken so far."""

    def __init__(self, court: Court, network: HostileNetwork, workers: list[WorkerSettings]) -> None:
        self.court = court
        self.network = network
        self.done: Counter[str] = Counter()
        self.boost = 1.0  # of the load
        self._settings = {worker.worker_id: worker for worker in workers}
        self._random = random.Random(f"unrest/{SEED}")
        self._actions: tuple[Callable[[], Awaitable[None]], ...] = (
            self.kill_decode, self.kill_prefill, self.stop_a_worker, self.partition, self.leave, self.burst, self.drain,
        )  # fmt: skip

    async def round(self) -> None:
        """Two or three of the actions, at moments of their own."""
        chosen = self._random.sample(self._actions, self._random.choice((2, 3)))
        moments = [self._random.uniform(0.5, ROUND_S - 6) for _ in chosen]
        await asyncio.gather(*(self._later(*each) for each in zip(moments, chosen, strict=True)))

    async def _later(self, moment: float, action: Callable[[], Awaitable[None]]) -> None:
        await asyncio.sleep(moment)
        with contextlib.suppress(KeyError):  # the worker is down already, by another action
            await action()
            self.done[action.__name__] += 1

    def _any(self, role: str, count: int) -> str:
        return f"{role}-{self._random.randrange(count)}"

    async def kill_decode(self) -> None:
        self.court.cluster.kill(self._any("decode", DECODE))

    async def kill_prefill(self) -> None:
        self.court.cluster.kill(self._any("prefill", PREFILL))

    async def stop_a_worker(self) -> None:
        process = self.court.cluster.process(self._any("decode", DECODE))
        process.signal(signal.SIGSTOP)
        await asyncio.sleep(self._random.uniform(0.3, 3.0))
        with contextlib.suppress(ProcessLookupError):
            process.signal(signal.SIGCONT)

    async def partition(self) -> None:
        self.network.cut(**self._random.choice(({}, {"to_target": False}, {"to_client": False})))
        await asyncio.sleep(self._random.uniform(0.3, 2.5))
        self.network.heal()

    async def leave(self) -> None:
        live = list(self.court.streams.live.values())
        for generation in self._random.sample(live, min(10, len(live))):
            generation.cancel()

    async def burst(self) -> None:
        self.boost = 2.0
        await asyncio.sleep(4)
        self.boost = 1.0

    async def drain(self) -> None:
        worker_id = self._any("decode", DECODE)
        supervisor = self.court.cluster.supervisor
        self.court.cluster.process(worker_id)  # KeyError: it is down
        entry = supervisor.roster.entry(worker_id)
        assert entry is not None
        await supervisor.remove(worker_id, 5.0)
        fresh = replace(self._settings[worker_id], incarnation=entry.incarnation + 1)
        supervisor.add(fresh)


class Arrivals:
    """An open loop of requests, numbered over all rounds."""

    def __init__(self, court: Court, unrest: Unrest) -> None:
        self._court = court
        self._unrest = unrest
        self._random = random.Random(f"load/{SEED}")
        self.number = 0

    async def round(self) -> None:
        """For one round's time; returns when all of its requests have ended."""
        ends = time.monotonic() + ROUND_S
        streams = []
        while time.monotonic() < ends:
            streams.append(asyncio.ensure_future(self._court.streams.run_one(self.number, self._next())))
            await asyncio.sleep(self._random.expovariate(CAPACITY * LOAD * self._unrest.boost))
        await asyncio.wait_for(asyncio.gather(*streams), 60)

    def _next(self) -> GenerateRequest:
        self.number += 1
        output = self._random.randint(MEAN_OUTPUT // 2, MEAN_OUTPUT * 3 // 2)
        request = oracle_request(self.number, self._random.randint(10, 90), output, PACE, SEED)
        self._court.expect([request])
        return request


@dataclass(frozen=True, slots=True)
class Memory:
    """Of this process: blocks that Python has allocated, and bytes that the system counts."""

    blocks: int
    resident: int

    @staticmethod
    def now() -> Memory:
        """Without what either allocator could give back."""
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return Memory(sys.getallocatedblocks(), pages * os.sysconf("SC_PAGE_SIZE"))


async def soak(seconds: float, full_rounds: int, resident_share: float, folder: Path) -> None:
    plan = FaultPlan(FAULTS, SEED, folder / "proof")
    workers = oracle_workers(PREFILL, DECODE, PACE)
    totals: Counter[str] = Counter()
    ends = time.monotonic() + seconds
    rounds = 0
    warm = full = now = Memory.now()
    async with lawful(workers, ROUTER, plan=plan, log_file=folder / "log") as court:
        with hostile_network() as network:
            unrest = Unrest(court, network, workers)
            arrivals = Arrivals(court, unrest)
            while time.monotonic() < ends:
                await asyncio.gather(arrivals.round(), unrest.round())
                assert await court.cluster.wait_ready(30), court.cluster.fleet.workers()
                await court.rest()
                await court.hang_up(on_all=False)
                network.close()
                court.judge()
                totals.update(court.terminals())
                said = (
                    f"seed {SEED}, {dict(court.terminals())}, broken {dict(unrest.done)}, blocks {court.held()}, "
                    f"longest gap {court.streams.tally.longest_gap_s:.1f} s"
                )
                court.require()
                court.begin_anew()
                rounds, now = rounds + 1, Memory.now()
                warm = now if rounds <= WARM_ROUNDS else warm
                full = now if rounds <= full_rounds else full
                alive, resident = now.blocks / warm.blocks - 1, now.resident / full.resident - 1
                print(f"{said}, memory alive {alive:+.2%}, resident {resident:+.2%}", flush=True)
    print(f"{sum(totals.values())} requests: {dict(totals)}; broken {dict(unrest.done)}; {dict(plan.fired())}")
    assert totals["failed"] == 0
    assert totals["completed"] > 0.9 * sum(totals.values())
    assert now.blocks <= warm.blocks * (1 + MEMORY_SHARE), "what is alive grew"
    assert now.resident <= full.resident * (1 + resident_share), "memory grew"


@pytest.mark.timeout(300)
def test_three_minutes(tmp_path: Path) -> None:
    asyncio.run(soak(170.0, WARM_ROUNDS, FILLING_SHARE, tmp_path))


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_thirty_minutes(tmp_path: Path) -> None:
    asyncio.run(soak(1800.0, FULL_ROUNDS, MEMORY_SHARE, tmp_path))
