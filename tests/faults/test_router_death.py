"""An ingress process is killed in the middle of its streams: its workers let go of them, another ingress goes on."""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path

import pytest
from fakes.oracle_cluster import KEY, Pace, Streams, leaked_blocks, oracle_request, oracle_worker
from fakes.second_router import STREAMS

from penstock.cluster.local import LocalCluster
from penstock.router.settings import AdmissionSettings, RouterSettings
from penstock.workers.protocol import Role

SECOND_ROUTER = Path(__file__).parents[1] / "fakes" / "second_router.py"


@pytest.mark.timeout(60)
def test_a_killed_routers_work_ends_and_its_blocks_come_back(tmp_path: Path) -> None:
    async def scenario() -> None:
        pace = Pace(step_s=0.01)
        workers = [oracle_worker(Role.MIXED, index, pace) for index in (0, 1)]
        router = RouterSettings(admission=AdmissionSettings(ttft_target_s=60.0))
        async with LocalCluster(workers, router, log_file=tmp_path / "log") as cluster:
            addresses = [f"{entry.address}={entry.worker_id}" for entry in cluster.supervisor.roster.entries]
            other = await asyncio.create_subprocess_exec(
                sys.executable, str(SECOND_ROUTER), KEY, *addresses, stdout=asyncio.subprocess.PIPE
            )
            try:
                assert other.stdout is not None
                assert await other.stdout.readline() == b"all stream\n"
                streams = Streams(cluster)
                running = asyncio.ensure_future(streams.run([oracle_request(n, 30, 200, pace) for n in range(20)]))
                await streams.until_tokens(40)
                begun = time.monotonic()
                while sum(status.running for status in cluster.fleet.workers()) <= STREAMS:
                    assert time.monotonic() - begun < 5.0, "the other router holds nothing"
                    await asyncio.sleep(0.05)
            finally:
                other.kill()
                await other.wait()
            killed = time.monotonic()
            while sum(status.running for status in cluster.fleet.workers()) > 20:
                assert time.monotonic() - killed < 3.0, "the dead router's sequences still run"
                await asyncio.sleep(0.05)
            tally = await running
            assert (tally.completed, tally.wrong, dict(tally.failed)) == (20, [], {}), tally.line()
            assert await leaked_blocks(cluster) == 0

    asyncio.run(scenario())
