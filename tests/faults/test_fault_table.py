"""Faults over real processes, a row each: every request ends lawfully, whatever breaks.

A row is a name, a shape, and what breaks: faults of a plan, or a function that breaks something from outside. `-s`
prints seed, proof of firing, requests by terminal state, the longest gap in a stream, blocks and processes left.

`PENSTOCK_FAULT_SEED` draws other moments, blocks and bytes, and other prompts.
"""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import Awaitable, Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import pytest
from fakes.control_group import control_group
from fakes.fault_plan import Action, Fault, FaultPlan
from fakes.hostile_network import HostileNetwork, hostile_network
from fakes.lawful import Court, lawful
from fakes.oracle_cluster import PATIENT, Pace, oracle_request, oracle_worker, oracle_workers

from penstock.cluster.roster import RosterEntry, WorkerState
from penstock.router.settings import PlacementSettings, RouterSettings
from penstock.workers.fault_points import Point
from penstock.workers.protocol import Role

pytestmark = pytest.mark.timeout(120)
SEED = int(os.environ.get("PENSTOCK_FAULT_SEED", "1"))
SPLIT = RouterSettings(PlacementSettings(local_prefill_tokens=0), PATIENT)


P, D = "prefill-0", "decode-0"
SHARED = Pace(step_s=0.003, lease_s=1.0, chunk=64)
TCP = Pace(step_s=0.003, lease_s=1.0, chunk=64, transport="tcp", digest="full")


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table."""

    name: str
    faults: tuple[Fault, ...] = ()
    pace: Pace = SHARED
    streams: int = 60
    outside: Callable[[Court, HostileNetwork], Awaitable[None]] | None = None  # what the test breaks, while streams run
    link: dict[str, float] | None = None  # of the network between P and D, as of TcpProxy
    may: frozenset[str] = frozenset()  # how requests may end beside completed; what it lists must happen, but failed
    prompt: int = 40
    output: int = 24
    prefill: int = 2
    decode: int = 2
    slow: bool = False  # a sister of another row, or long: not in CI


async def leave(court: Court, _: HostileNetwork) -> None:
    """Twenty readers go away at the moment at which the plan holds them."""
    await asyncio.sleep(0.3)
    for generation in list(court.streams.live.values())[:20]:
        generation.cancel()


async def leave_later(court: Court, network: HostileNetwork) -> None:
    await court.streams.until_tokens(300)
    await leave(court, network)


def partition(seconds: float, **ways: bool) -> Callable[[Court, HostileNetwork], Awaitable[None]]:
    async def outside(court: Court, network: HostileNetwork) -> None:
        await court.streams.until_tokens(40)
        network.cut(**ways)
        await asyncio.sleep(seconds)
        network.heal()

    return outside


def entry(court: Court, worker_id: str) -> RosterEntry:
    return next(each for each in court.cluster.supervisor.roster.entries if each.worker_id == worker_id)


async def join_dying(court: Court, _: HostileNetwork) -> None:
    """A third decode worker joins, and dies at its start again and again: it waits longer each time, and says why."""
    court.cluster.supervisor.add(oracle_worker(Role.DECODE, 2, SLOW))
    reasons: set[str] = set()
    async with asyncio.timeout(40.0):
        while entry(court, "decode-2").state is not WorkerState.READY:
            reasons.add(entry(court, "decode-2").reason)
            await asyncio.sleep(0.02)
    assert any("ended by SIGKILL" in reason for reason in reasons), reasons
    assert court.plan is not None
    starts = [float(str(line["at"])) for line in court.plan.proofs()]
    waits = [later - earlier for earlier, later in itertools.pairwise(starts)]
    assert all(wait >= least for wait, least in zip(waits, (0.2, 0.4, 0.8), strict=True)), waits


async def quarantined(court: Court, _: HostileNetwork) -> None:
    """The one prefill worker whose blocks are wrong wherever they come gets no more prompts; decode computes them."""
    async with asyncio.timeout(30.0):
        while not {worker.id: worker.quarantined for worker in court.cluster.fleet.workers()}[P]:  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def out_of_memory(court: Court, _: HostileNetwork) -> None:
    """One decode worker is ended by it, and no other."""
    with control_group("memory", "memory.limit_in_bytes", 256 << 10) as group:
        await court.streams.until_tokens(40)
        (pid,) = court.cluster.process(D).pids
        group.write_text(str(pid))
        reason = await court.cluster.process(D).ended()
    assert reason == "ended by SIGKILL"
    others = [each for each in court.cluster.supervisor.roster.entries if each.worker_id != D]
    assert [each.restarts for each in others] == [0, 0, 0]


async def none_then_two(court: Court, _: HostileNetwork) -> None:
    """Scaled to no decode worker under a burst, and up again before its patience ends."""
    await court.streams.until_tokens(40)
    for name in (D, "decode-1"):
        await court.cluster.supervisor.remove(name, 0.0)
    assert len(court.streams.live) > 0, "all had ended: the fault did not fire"
    await asyncio.sleep(1.0)
    for number in (2, 3):
        court.cluster.supervisor.add(oracle_worker(Role.DECODE, number, SHARED))


LONG_LEASE = Pace(step_s=0.003, lease_s=30.0, chunk=64)  # what is not freed before its lease is not freed in time
SLOW = Pace(step_s=0.02, token_s=0.0005, lease_s=30.0, chunk=64)
TINY = Pace(step_s=0.003, lease_s=0.05, chunk=64, num_blocks=24, reserve_tokens=8, context=64)
TINY_TCP = Pace(
    step_s=0.003, lease_s=0.05, chunk=64, num_blocks=24, reserve_tokens=8, context=64, transport="tcp", digest="full"
)
LEFT, FAILED = frozenset({"cancelled"}), frozenset({"failed", "shed"})


def damaged(chance: float, times: int) -> Fault:
    return Fault(Point.TRANSFER_LAND, Action.CORRUPT, D, chance=chance, times=times, byte=None)


ROWS = [
    Row("F1 prefill killed before its first block", (Fault(Point.TRANSFER_SEND, Action.KILL, P),)),
    Row("F2 prefill killed after 7 blocks", (Fault(Point.TRANSFER_SENT, Action.KILL, P, after=7),)),
    Row("F2 the same over TCP", (Fault(Point.TRANSFER_SENT, Action.KILL, P, after=7),), TCP, slow=True),
    Row("F3 decode killed before its first frame", (Fault(Point.FRAME_OUT, Action.KILL, D),), slow=True),
    Row("F3 decode killed after its first frame", (Fault(Point.FRAME_SENT, Action.KILL, D),), slow=True),
    Row("F3 decode killed in the middle", (Fault(Point.FRAME_OUT, Action.KILL, D, after=15),)),
    Row("F6 half of the blocks dropped", (Fault(Point.TRANSFER_SEND, Action.DROP, P, chance=0.5, times=60),)),
    Row("F7 one byte of blocks damaged", (damaged(0.3, 40),), TCP),
    Row(
        "F7 all blocks of one prefill worker damaged",
        (Fault(Point.TRANSFER_LAND, Action.CORRUPT, times=5000, byte=None),),
        TCP,
        outside=quarantined,
        prefill=1,
        slow=True,
    ),
    Row(
        "F8 blocks and acknowledgements doubled",
        (
            Fault(Point.TRANSFER_SEND, Action.DUPLICATE, P, chance=0.5, times=200),
            Fault(Point.TRANSFER_ACK, Action.DUPLICATE, D, times=40),
        ),
        slow=True,
    ),
    Row(
        "F8 requests, answers and frames doubled",
        tuple(
            Fault(point, Action.DUPLICATE, times=100, chance=0.5)
            for point in (Point.SUBMIT_TAKE, Point.SUBMIT_REPLY, Point.FRAME_OUT)
        ),
    ),
    Row(
        "F14 events of the cache dropped and doubled",
        (
            Fault(Point.KV_PUBLISH, Action.DROP, chance=0.3, times=30),
            Fault(Point.KV_PUBLISH, Action.DUPLICATE, chance=0.3, times=30),
        ),
        slow=True,
    ),
    Row(
        "F9 read after release",
        (Fault(Point.TRANSFER_OFFER, Action.DELAY, D, chance=0.3, times=10, seconds=0.3),),
        TINY,
        prompt=20,
        output=10,
        may=FAILED,
    ),
    Row(
        "F9 write after release",
        (Fault(Point.TRANSFER_SEND, Action.STOP, P, chance=0.2, times=4, seconds=0.3),),
        TINY_TCP,
        prompt=20,
        output=10,
        may=FAILED,
    ),
    Row(
        "F11 readers leave the queue",
        (Fault(Point.STEP_BEGIN, Action.DELAY, times=6, seconds=0.3),),
        LONG_LEASE,
        outside=leave,
        may=LEFT,
        slow=True,
    ),
    Row(
        "F11 readers leave while prompts are computed",
        (Fault(Point.STEP_END, Action.DELAY, P, 2, 4, seconds=0.3),),
        SLOW,
        outside=leave,
        may=LEFT,
        slow=True,
    ),
    Row(
        "F11 readers leave while blocks move",
        (Fault(Point.TRANSFER_SEND, Action.DELAY, times=400, seconds=0.01),),
        LONG_LEASE,
        outside=leave,
        may=LEFT,
        slow=True,
    ),
    Row(
        "F11 readers leave between prefill and decode",
        (Fault(Point.TRANSFER_OFFER, Action.DELAY, times=8, seconds=0.3),),
        LONG_LEASE,
        outside=leave,
        may=LEFT,
    ),
    Row(
        "F11 readers leave while it decodes",
        (Fault(Point.STEP_END, Action.DELAY, D, 10, 200, seconds=0.02),),
        LONG_LEASE,
        outside=leave_later,
        output=100,
        may=LEFT,
        slow=True,
    ),
    Row("F24 partition between P and D for 1 s", (), TCP, 80, partition(1.0), {}),
    Row("F24 answers of D lost for 1 s", (), TCP, 80, partition(1.0, to_target=False), {}, slow=True),
    Row("F24 partition for three leases", (), TCP, 80, partition(3.0), {}, slow=True),
    Row("F26 10 ms, jitter, 1 MB/s", (), TCP, link={"delay_s": 0.01, "jitter_s": 0.01, "bytes_per_s": 1e6}, slow=True),
    Row("F27 acknowledgement lost after the hand-over", (Fault(Point.TRANSFER_ACK, Action.DROP, D, times=5),)),
    Row(
        "F29 a worker that dies at its start joins",
        (Fault(Point.WORKER_START, Action.KILL, "decode-2", times=4),),
        SLOW,
        outside=join_dying,
        output=100,
        slow=True,
    ),
    Row("F44 scaled to none under a burst, and up", (), outside=none_then_two),
    Row("a clock jumps ahead by five leases", (Fault(Point.CLOCK, Action.JUMP, D, 300, seconds=5.0),)),
    Row("a clock jumps back by a minute", (Fault(Point.CLOCK, Action.JUMP, D, 300, seconds=-60.0),), slow=True),
    Row("F31 a step raises", (Fault(Point.STEP_BEGIN, Action.RAISE, D, after=5, error="MemoryError"),)),
    Row("F32 no memory is left for a decode worker", (), SLOW, outside=out_of_memory, output=100, slow=True),
    Row("F33 the device fails", (Fault(Point.STEP_BEGIN, Action.RAISE, D, after=10, error="DeviceError"),), slow=True),
]


@pytest.mark.parametrize(
    "row",
    [pytest.param(row, marks=[pytest.mark.slow] if row.slow else [], id=row.name.replace(" ", "-")) for row in ROWS],
)
def test_row(row: Row, tmp_path: Path) -> None:
    asyncio.run(run_row(row, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 20))
@pytest.mark.parametrize("row", [row for row in ROWS if row.name.startswith("F9")], ids=["read", "write"])
def test_a_thousand_late_reads_and_writes_give_no_wrong_text(row: Row, seed: int, tmp_path: Path) -> None:
    asyncio.run(run_row(row, tmp_path, seed))


async def run_row(row: Row, tmp_path: Path, seed: int = SEED) -> None:
    plan = FaultPlan(row.faults, seed, tmp_path / "proof")
    workers = oracle_workers(row.prefill, row.decode, row.pace)
    async with lawful(workers, SPLIT, plan=plan, log_file=tmp_path / "log") as court:
        with hostile_network(**row.link) if row.link is not None else nullcontext(HostileNetwork()) as network:
            requests = [oracle_request(n, row.prompt + n % 30, row.output, row.pace, seed) for n in range(row.streams)]
            running = asyncio.ensure_future(court.run(requests))
            if row.outside is not None:
                await row.outside(court, network)
            await running
    print(court.row(row.name))
    if row.link is not None:
        assert network.proxies, "no block passed through the network"
    ends = court.terminals()
    assert ends.total() == row.streams
    assert set(ends) <= {"completed", *row.may}, ends
    assert "cancelled" in ends or "cancelled" not in row.may, "nobody left: the fault did not fire"
