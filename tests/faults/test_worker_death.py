"""Workers are killed under 200 oracle streams: with survivors nothing fails, without any every stream ends typed."""

from __future__ import annotations

import asyncio
import dataclasses
from itertools import product
from pathlib import Path

import pytest
from fakes.fault_plan import Action, Fault, FaultPlan, planned_workers
from fakes.in_ci import every
from fakes.liveness import alive
from fakes.oracle_cluster import PATIENT, Pace, Streams, leaked_blocks, oracle_request, oracle_workers, wait_running

from penstock.cluster.local import LocalCluster
from penstock.cluster.subprocess_host import SubprocessHost
from penstock.router.settings import PlacementSettings, RetrySettings, RouterSettings
from penstock.workers.fault_points import Point

STREAMS = 200
ROUTER = RouterSettings(
    PlacementSettings(local_prefill_tokens=0),  # short prompts would else be computed where they decode
    PATIENT,
)


def requests(pace: Pace, output_tokens: int = 48) -> list:
    return [oracle_request(n, 10 + n % 60, output_tokens, pace) for n in range(STREAMS)]


async def assert_all_back(cluster: LocalCluster, streams: Streams, pids: set[int]) -> None:
    assert await leaked_blocks(cluster) == 0
    await cluster.stop()
    assert [pid for pid in pids | pids_of(cluster) if alive(pid)] == []


def pids_of(cluster: LocalCluster) -> set[int]:
    return {pid for status in cluster.fleet.workers() for pid in status.pids}


@pytest.mark.timeout(90)
@pytest.mark.parametrize(
    ("moment", "transport"),
    every(3, product(("before the first token", "after the first token", "mid-stream"), ("shared_memory", "tcp"))),
)
def test_decode_worker_killed(moment: str, transport: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        slow = moment == "before the first token"
        pace = Pace(transport=transport, step_s=0.004, token_s=0.0007 if slow else 0.00002)
        cluster = LocalCluster(oracle_workers(1, 2, pace), ROUTER, log_file=tmp_path / "log")
        async with cluster:
            pids = pids_of(cluster)
            streams = Streams(cluster)
            running = asyncio.ensure_future(streams.run(requests(pace)))
            if slow:
                held = await wait_running(cluster, "decode-0")
                assert streams.tally.begun < STREAMS // 2, "most streams must still wait for their first token"
            else:
                await streams.until_tokens(1 if moment == "after the first token" else STREAMS * 12)
                held = await wait_running(cluster, "decode-0")
            killed = cluster.kill("decode-0")
            tally = await asyncio.wait_for(running, 60)
            print(f"{moment}, {transport}: killed {killed} holding {held} sequences; {tally.line()}")
            assert held > 0, "the fault did not fire: the killed worker held nothing"
            assert tally.completed == STREAMS
            assert tally.wrong == []
            assert await cluster.wait_ready(20)
            await assert_all_back(cluster, streams, pids)

    asyncio.run(scenario())


@pytest.mark.timeout(90)
@pytest.mark.parametrize(
    ("fragments", "transport"), every(4, [(1, "shared_memory"), (1, "tcp"), (25, "shared_memory"), (25, "tcp")])
)
def test_prefill_worker_killed_between_two_blocks(fragments: int, transport: str, tmp_path: Path) -> None:
    """The first incarnation of prefill-0 dies by itself once so many blocks have left it."""

    async def scenario() -> None:
        pace = Pace(transport=transport, step_s=0.004, chunk=32)
        fault = Fault(Point.TRANSFER_SENT, Action.KILL, "prefill-0", after=fragments)
        plan = FaultPlan((fault,), proof=tmp_path / "proof")
        host = SubprocessHost(tmp_path / "log", command=planned_workers(plan))
        cluster = LocalCluster(oracle_workers(2, 2, pace), ROUTER, host=host)
        async with cluster:
            pids = pids_of(cluster)
            streams = Streams(cluster)
            tally = await asyncio.wait_for(streams.run(requests(pace)), 60)
            assert await cluster.wait_ready(20)
            deaths = {s.id: s.restarts for s in cluster.fleet.workers()}
            print(f"prefill died after {fragments} blocks, {transport}: restarts {deaths}; {tally.line()}")
            plan.require_fired()
            assert deaths["prefill-0"] == 1
            assert tally.completed == STREAMS
            assert tally.wrong == []
            await assert_all_back(cluster, streams, pids)

    asyncio.run(scenario())


@pytest.mark.timeout(60)
def test_without_survivors_every_stream_ends_typed(tmp_path: Path) -> None:
    async def scenario() -> None:
        pace = Pace(step_s=0.005, token_s=0.0002, num_blocks=1 << 14)
        router = dataclasses.replace(ROUTER, retry=RetrySettings(no_worker_timeout_s=1.5))
        cluster = LocalCluster(oracle_workers(1, 1, pace), router, restart=False, log_file=tmp_path / "log")
        async with cluster:
            streams = Streams(cluster)
            running = asyncio.ensure_future(streams.run(requests(pace, 200)))
            await streams.until_tokens(STREAMS)
            cluster.kill("decode-0")
            tally = await asyncio.wait_for(running, 30)
            print(f"decode-0 killed, nobody left to decode: {tally.line()}")
            assert sum(tally.failed.values()) > 0, "the fault did not fire"
            assert tally.completed + sum(tally.failed.values()) == STREAMS, "a stream ended silently short"
            assert set(tally.failed) <= {"no_worker", "worker_lost"}
            assert tally.wrong == []

    asyncio.run(scenario())


@pytest.mark.slow
@pytest.mark.timeout(60)
def test_decode_workers_go_on_without_any_prefill_worker(tmp_path: Path) -> None:
    """A worker is a worker: with the prefill pool gone, prompts are computed where they decode."""

    async def scenario() -> None:
        pace = Pace(step_s=0.002, token_s=0.0005)
        patient = RouterSettings(admission=PATIENT)
        cluster = LocalCluster(oracle_workers(1, 1, pace), patient, restart=False, log_file=tmp_path / "log")
        async with cluster:
            streams = Streams(cluster)
            running = asyncio.ensure_future(streams.run(requests(pace)))
            await streams.until_tokens(20)
            cluster.kill("prefill-0")
            assert streams.tally.completed < STREAMS // 2
            tally = await asyncio.wait_for(running, 45)
            print(f"prefill-0 killed, nobody left to prefill: {tally.line()}")
            assert tally.completed == STREAMS
            assert tally.wrong == []

    asyncio.run(scenario())
