"""The disk tier of a serving worker process fails: full, damaged, gone. Texts stay right, and the log says it once.

More ways in one process: `tests/workers/kv/test_disk_tier.py`. `-s` prints the rows of the fault table.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from fakes.fault_plan import ALWAYS, Action, Fault, FaultPlan
from fakes.in_ci import every
from fakes.lawful import Court, lawful
from fakes.oracle_cluster import Pace, oracle_request, oracle_worker

from penstock.workers.fault_points import Point
from penstock.workers.protocol import Role
from penstock.workers.totals import TierFigures

PACE = Pace(num_blocks=600, step_s=0.0, token_s=0.0005)
PROMPTS = 6
HOST_BYTES = 1 << 14  # less than one prompt's blocks: what comes back comes from the disk
COMPLAINT = "the KV disk tier fails"


async def turn(court: Court, number: int) -> None:
    """Every prompt once, one after the other, so that each drives the one before it out of the pool."""
    for index in range(PROMPTS):
        request = oracle_request(index, 800, 8, PACE)
        await court.run([replace(request, request_id=f"r{number}-{index}")])


async def disk_says(court: Court, enough: Callable[[TierFigures], bool]) -> TierFigures:
    """What the worker tells of its disk, once that is enough."""
    async with asyncio.timeout(20.0):
        while True:
            (status,) = court.cluster.fleet.workers()
            if enough(status.totals.tiers.disk):
                return status.totals.tiers.disk
            await asyncio.sleep(0.05)


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 3 :: 97] = bytes(len(data[len(data) // 3 :: 97]))
    path.write_bytes(data)


def cut_short(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


def break_half(path: Path) -> None:
    for number, segment in enumerate(sorted(path.rglob("*.kv"))):
        (damage if number % 2 else cut_short)(segment)


def take_away(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))


async def serve(name: str, tmp_path: Path, faults: tuple[Fault, ...], breaks: Callable[[Path], None] | None) -> int:
    disk, log = tmp_path / "disk", tmp_path / "log"
    worker = oracle_worker(Role.MIXED, 0, PACE)
    tiers = replace(worker.kv, host_bytes=HOST_BYTES, disk_path=str(disk), disk_bytes=64 << 20)
    plan = FaultPlan(faults, 1, tmp_path / "proof")
    async with lawful([replace(worker, kv=tiers)], plan=plan, log_file=log) as court:
        await turn(court, 0)
        if breaks is not None:
            await disk_says(court, lambda figures: figures.held >= 500)
            breaks(disk)
        for number in (1, 2):
            await turn(court, number)
        figures = await disk_says(court, lambda figures: figures.errors > 0)
    complaints = log.read_text().count(COMPLAINT)
    print(f"{court.row(name)} | errors counted {figures.errors} | said {complaints} times")
    assert court.terminals() == {"completed": 3 * PROMPTS}
    assert court.cluster.supervisor.roster.entries[0].restarts == 0, "the worker did not outlive it"
    return complaints


@pytest.mark.timeout(90)
@pytest.mark.parametrize("after", every(2, [1, 6]))
def test_a_full_disk_turns_the_tier_off_and_is_said_once(after: int, tmp_path: Path) -> None:
    full = Fault(Point.DISK_WRITE, Action.DISK_FULL, "mixed-0", after=after, times=ALWAYS)
    assert asyncio.run(serve("F36 the disk is full", tmp_path, (full,), None)) == 1


@pytest.mark.timeout(90)
@pytest.mark.parametrize("breaks", every(2, [break_half, take_away]), ids=["damaged", "gone"])
def test_a_disk_that_lost_what_it_held_costs_time_only(breaks: Callable[[Path], None], tmp_path: Path) -> None:
    assert (
        asyncio.run(serve(f"F37 blocks on disk: {breaks.__name__}", tmp_path, (), breaks)) >= 1
    )  # a write that succeeds ends a complaint
