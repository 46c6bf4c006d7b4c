"""One rank of a worker is killed or stopped under 200 oracle streams: noticed at once, one restart, no orphan, no loss.

Through the host that `LocalCluster` uses; the ranks' own detectors are judged in `test_rank_faults.py`.
"""

from __future__ import annotations

import asyncio
import dataclasses
import signal
import time
from pathlib import Path

import pytest
from fakes.liveness import alive
from fakes.oracle_cluster import Pace, Streams, leaked_blocks, oracle_request, oracle_worker

from penstock.cluster.local import LocalCluster
from penstock.cluster.supervision import Backoff
from penstock.router.settings import AdmissionSettings, PlacementSettings, RouterSettings
from penstock.workers.protocol import Role
from penstock.workers.settings import GroupSettings, WorkerSettings

STREAMS = 200
PACE = Pace(step_s=0.004)
ALWAYS_SPLIT = RouterSettings(PlacementSettings(local_prefill_tokens=0), AdmissionSettings(ttft_target_s=120.0))
HEADS = 4  # of the whole oracle: pools of all widths here exchange KV


def group(role: Role, width: int) -> WorkerSettings:
    settings = oracle_worker(role, 0, PACE)
    return dataclasses.replace(
        settings,
        runner=dataclasses.replace(settings.runner, oracle_kv_heads=HEADS),
        group=GroupSettings(tensor_parallel_size=width, start_timeout_s=60.0),
    )


async def disturbed(tmp_path: Path, prefill: int, decode: int, victim: str, rank: int, number: int) -> None:
    workers = [group(Role.PREFILL, prefill), group(Role.DECODE, decode)]
    cluster = LocalCluster(workers, ALWAYS_SPLIT, backoff=Backoff(first_s=0.05), log_file=tmp_path / "log")
    async with cluster:
        assert [len(status.pids) for status in cluster.fleet.workers()] == [prefill, decode]
        before = {pid for status in cluster.fleet.workers() for pid in status.pids}
        hit = cluster.process(victim)
        streams = Streams(cluster)
        requests = [oracle_request(n, 10 + n % 60, 48, PACE) for n in range(STREAMS)]
        running = asyncio.ensure_future(streams.run(requests))
        await streams.until_tokens(STREAMS * 4)
        began = time.monotonic()
        hit.signal(number, rank)
        async with asyncio.timeout(20.0):
            # a process that ends sets no event of ours
            while not any(status.restarts for status in cluster.fleet.workers()):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        noticed_s = time.monotonic() - began
        assert [pid for pid in hit.pids if alive(pid)] == [], "the whole worker is gone by then"
        tally = await running
        assert (tally.completed, tally.failed, tally.wrong) == (STREAMS, {}, [])
        assert await cluster.wait_ready(30.0)
        assert {status.id: status.restarts for status in cluster.fleet.workers()} == {
            status.id: int(status.id == victim) for status in cluster.fleet.workers()
        }
        assert noticed_s < 3.0  # 2 s for silence, and what the others of the group take to end
        assert await leaked_blocks(cluster) == 0
        pids = before | {pid for status in cluster.fleet.workers() for pid in status.pids}
        assert len(pids) == prefill + decode + len(hit.pids)
    assert [pid for pid in pids if alive(pid)] == []
    words = (tmp_path / "log").read_text()
    assert f"{victim}/0 " in words, "log lines name the rank"
    assert f"{victim}/1 " in words


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("prefill", "decode", "victim", "rank", "number"),
    [
        (1, 2, "decode-0", 1, signal.SIGKILL),
        pytest.param(2, 2, "decode-0", 0, signal.SIGKILL, marks=pytest.mark.slow),
        pytest.param(2, 1, "prefill-0", 1, signal.SIGSTOP, marks=pytest.mark.slow),
        pytest.param(2, 4, "decode-0", 2, signal.SIGSTOP, marks=pytest.mark.slow),
        pytest.param(4, 2, "prefill-0", 0, signal.SIGSTOP, marks=pytest.mark.slow),
    ],
)
def test_one_rank_is_lost(prefill: int, decode: int, victim: str, rank: int, number: int, tmp_path: Path) -> None:
    asyncio.run(disturbed(tmp_path, prefill, decode, victim, rank, number))
