"""One rank of a group is killed, stopped or slowed under 200 oracle streams: the group ends as one and starts again.

`PENSTOCK_QUIET=1` says that nothing else runs on the machine, and holds the drills to their own seconds.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from fakes.in_ci import every
from fakes.liveness import alive
from fakes.oracle_cluster import PATIENT, Pace, Streams, leaked_blocks, oracle_request, oracle_worker
from fakes.rank_group import GroupHost, in_group

from penstock.cluster.local import LocalCluster
from penstock.router.settings import RouterSettings
from penstock.workers.parallel.fence import EXIT_GROUP_LOST, EXIT_RANK_STUCK
from penstock.workers.protocol import GenerateRequest, Role
from penstock.workers.settings import RunnerSettings, WorkerSettings

STREAMS = 200
STEP_S = 0.004
PACE = Pace(step_s=STEP_S)
EMBEDDED_MODEL = Path(__file__).parents[2] / "cluster" / "embedded_model"
SLOW_RANK = Path(__file__).parents[1] / "fakes" / "slow_rank.py"
BUSY_S = 0.0 if os.environ.get("PENSTOCK_QUIET") else 10.0  # more, where others take the cores


def blamed(log: Path) -> list[str]:
    return [line.split("at fault: ")[1] for line in log.read_text().splitlines() if "at fault: " in line]


class Drill:
    """A group of `width` ranks and one plain worker, 200 streams over both, and what became of them."""

    def __init__(self, width: int, log: Path, host: GroupHost | None = None, output_tokens: int = 400) -> None:
        self.log = log
        self.host = host or GroupHost(log)
        group = in_group(oracle_worker(Role.MIXED, 0, PACE), width)
        workers = [group, oracle_worker(Role.MIXED, 1, PACE)]
        self.cluster = LocalCluster(workers, RouterSettings(admission=PATIENT), host=self.host)
        self.requests = [oracle_request(n, 10 + n % 60, output_tokens, PACE) for n in range(STREAMS)]
        self.streams = Streams(self.cluster)

    @property
    def group(self):
        """Its first life."""
        return next(each for each in self.host.hosted if each.settings.group.width > 1)

    async def run(self, fault) -> float:
        """Seconds from the fault to the end of the group's first life; everything else is checked here."""
        async with self.cluster:
            running = asyncio.ensure_future(self.streams.run(self.requests))
            await self.streams.until_tokens(STREAMS * 8)
            assert not self.group.over.is_set()
            began = time.monotonic()
            await fault(self.group)
            await asyncio.wait_for(self.group.over.wait(), 30)
            tally = await asyncio.wait_for(running, 60)
            print(tally.line(), self.group.codes, f"first end {self.group.first_end - began:.2f} s")
            assert tally.completed == STREAMS
            assert tally.wrong == []
            assert await self.cluster.wait_ready(20)
            restarts = {status.id: status.restarts for status in self.cluster.fleet.workers()}
            assert restarts == {"mixed-0": 1, "mixed-1": 0}
            assert await leaked_blocks(self.cluster) == 0
            pids = [pid for hosted in self.host.hosted for pid in hosted.pids]
            await self.cluster.stop()
            assert [pid for pid in pids if alive(pid)] == []
        return self.group.first_end - began


@pytest.mark.timeout(90)
@pytest.mark.parametrize(("width", "rank"), every(3, [(2, 1), (2, 0), (4, 2)]))
def test_rank_killed(width: int, rank: int, tmp_path: Path) -> None:
    async def fault(group) -> None:
        group.ranks[rank].signal(signal.SIGKILL)

    drill = Drill(width, tmp_path / "log", output_tokens=60)
    asyncio.run(drill.run(fault))
    assert drill.group.last_end - drill.group.first_end < 1.0 + BUSY_S
    assert drill.group.codes == [-signal.SIGKILL if each == rank else EXIT_GROUP_LOST for each in range(width)]
    if rank:
        assert all(line.startswith(f"rank {rank};") for line in blamed(drill.log))


@pytest.mark.timeout(90)
@pytest.mark.parametrize(("width", "rank"), every(3, [(2, 0), (2, 1), (4, 3)]))
def test_rank_stopped(width: int, rank: int, tmp_path: Path) -> None:
    """It cannot end itself, so another rank ends it."""

    async def fault(group) -> None:
        group.ranks[rank].signal(signal.SIGSTOP)

    drill = Drill(width, tmp_path / "log", output_tokens=160)
    noticed_s = asyncio.run(drill.run(fault))
    assert noticed_s < 2.2 + BUSY_S
    assert drill.group.last_end - drill.group.first_end < 1.0 + BUSY_S
    assert drill.group.codes == [-signal.SIGKILL if each == rank else EXIT_GROUP_LOST for each in range(width)]
    if rank:
        assert blamed(drill.log)
        assert all(line.startswith(f"rank {rank};") for line in blamed(drill.log))


@pytest.mark.slow
@pytest.mark.timeout(90)
@pytest.mark.parametrize("rank", [0, 1])
def test_rank_slow(rank: int, tmp_path: Path) -> None:
    """Three times as long per step, from the 60th on; it ends with a code of its own, and the others with theirs."""
    command = (sys.executable, str(SLOW_RANK), "60", str(3 * STEP_S))
    host = GroupHost(tmp_path / "log", {rank: command})
    drill = Drill(2, tmp_path / "log", host)

    async def fault(_) -> None:  # it comes by itself
        return None

    assert asyncio.run(drill.run(fault)) < 2.3 + BUSY_S  # the fault comes a moment after the clock starts
    lines = blamed(drill.log)
    assert lines
    assert all(line.startswith(f"rank {rank}; rank {rank} takes ") for line in lines)
    assert drill.group.codes[rank] in (EXIT_RANK_STUCK, -signal.SIGKILL)
    assert drill.group.codes[1 - rank] == EXIT_GROUP_LOST


@pytest.mark.slow
@pytest.mark.timeout(90)
def test_a_rank_that_stands_still_every_now_and_then_is_slow(tmp_path: Path) -> None:
    async def fault(group) -> None:
        async def stutter() -> None:
            while not group.over.is_set():
                group.ranks[1].signal(signal.SIGSTOP)
                await asyncio.sleep(0.1)
                group.ranks[1].signal(signal.SIGCONT)
                await asyncio.sleep(0.02)

        group.stutter = asyncio.ensure_future(stutter())

    drill = Drill(2, tmp_path / "log")
    assert asyncio.run(drill.run(fault)) < 2.0 + BUSY_S
    assert all(line.startswith("rank 1;") for line in blamed(drill.log))


@pytest.mark.slow
@pytest.mark.timeout(90)
@pytest.mark.parametrize("rank", [0, 1])
def test_idle_group_notices_a_stopped_rank_too(rank: int, tmp_path: Path) -> None:
    async def scenario() -> float:
        host = GroupHost(tmp_path / "log")
        hosted = await host.start(in_group(oracle_worker(Role.MIXED, 0, PACE), 2))
        ended = asyncio.ensure_future(hosted.ended())
        await asyncio.sleep(0.7)
        began = time.monotonic()
        hosted.ranks[rank].signal(signal.SIGSTOP)
        await asyncio.wait_for(ended, 10)
        assert sorted(hosted.codes) == [-signal.SIGKILL, EXIT_GROUP_LOST]
        print("idle:", hosted.first_end - began, hosted.codes, blamed(tmp_path / "log"))
        return hosted.first_end - began

    assert asyncio.run(scenario()) < 2.1 + BUSY_S


@pytest.mark.slow
@pytest.mark.timeout(200)
@pytest.mark.parametrize(("number", "rank"), every(2, [(signal.SIGKILL, 1), (signal.SIGSTOP, 1), (signal.SIGSTOP, 0)]))
def test_a_rank_of_a_real_checkpoint(number: signal.Signals, rank: int, tmp_path: Path) -> None:
    """The embedded model on two ranks: texts are those of one worker that nobody disturbed."""
    asked = [oracle_request(n, 8 + n % 40, 60, Pace(block_size=16)) for n in range(24)]
    asked = [replace(one, prompt=tuple(token % 1500 for token in one.prompt), prefix_digests=b"") for one in asked]

    def worker(index: int) -> WorkerSettings:
        plain = oracle_worker(Role.MIXED, index, Pace(block_size=16, num_blocks=1024))
        runner = RunnerSettings(kind="model", model_dir=str(EMBEDDED_MODEL), dtype="float32")
        return replace(plain, runner=runner, scheduler=replace(plain.scheduler, max_model_len=256))

    async def texts(cluster: LocalCluster, fault: Callable[[], None] | None = None) -> list[list[int]]:
        count = 0

        async def one(request: GenerateRequest) -> list[int]:
            nonlocal count
            got: list[int] = []
            async for delta in cluster.generator.submit(request):
                got += delta.tokens
                count += len(delta.tokens)
                if fault is not None and count >= 24 * 12 and not fired:
                    fired.append(time.monotonic())
                    fault()
            return got

        fired: list[float] = []
        found = list(await asyncio.gather(*(one(request) for request in asked)))
        assert fault is None or fired
        return found

    async def scenario() -> None:
        async with LocalCluster([worker(0)], log_file=tmp_path / "log") as alone:
            undisturbed = await texts(alone)
        host = GroupHost(tmp_path / "group-log")
        async with LocalCluster([in_group(worker(0), 2), worker(1)], host=host) as cluster:
            group = next(each for each in host.hosted if each.settings.group.width > 1)
            began: list[float] = []

            def fault() -> None:
                began.append(time.monotonic())
                group.ranks[rank].signal(number)

            assert await texts(cluster, fault) == undisturbed
            await asyncio.wait_for(group.over.wait(), 10)
            print("real checkpoint:", group.codes, f"{group.first_end - began[0]:.2f} s")
            assert group.first_end - began[0] < 2.2 + BUSY_S
            assert await cluster.wait_ready(60)
            assert {status.id: status.restarts for status in cluster.fleet.workers()} == {"mixed-0": 1, "mixed-1": 0}
            pids = [pid for hosted in host.hosted for pid in hosted.pids]
            await cluster.stop()
            assert [pid for pid in pids if alive(pid)] == []

    asyncio.run(scenario())
