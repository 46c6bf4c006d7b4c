"""A router runs for 10 ms in 610: what its workers say waits in its sockets, which is no silence of theirs.

Figures are printed; run with `-s`.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from pathlib import Path

import pytest
from fakes.oracle_cluster import KEY, Pace, leaked_blocks, oracle_worker

from penstock.cluster.local import LocalCluster
from penstock.workers.protocol import Role

STARVED_ROUTER = Path(__file__).parents[1] / "fakes" / "starved_router.py"
FOR_S = 12.0
STOPPED_S, RUNNING_S = 0.6, 0.01


@pytest.mark.timeout(90)
def test_a_starved_router_gives_up_no_worker(tmp_path: Path) -> None:
    async def scenario() -> None:
        workers = [oracle_worker(Role.MIXED, index, Pace(step_s=0.01)) for index in (0, 1)]
        async with LocalCluster(workers, log_file=tmp_path / "log") as cluster:
            addresses = [f"{entry.address}={entry.worker_id}" for entry in cluster.supervisor.roster.entries]
            pipe = asyncio.subprocess.PIPE
            router = await asyncio.create_subprocess_exec(
                sys.executable, str(STARVED_ROUTER), KEY, *addresses, stdin=pipe, stdout=pipe
            )
            try:
                assert router.stdin is not None
                assert router.stdout is not None
                assert await router.stdout.readline() == b"all stream\n"
                stops = 0
                until = asyncio.get_running_loop().time() + FOR_S
                while asyncio.get_running_loop().time() < until:
                    router.send_signal(signal.SIGSTOP)
                    await asyncio.sleep(STOPPED_S)
                    router.send_signal(signal.SIGCONT)
                    await asyncio.sleep(RUNNING_S)
                    stops += 1
                router.stdin.write(b"enough\n")
                found = json.loads(await asyncio.wait_for(router.stdout.readline(), 40.0))
            finally:
                if router.returncode is None:
                    router.kill()
                await router.wait()
            print(f"stopped {stops} times: {found}")
            assert (found["given_up"], found["failed"], found["wrong"]) == (0, {}, [])
            assert stops > 10
            assert await leaked_blocks(cluster) == 0

    asyncio.run(scenario())
