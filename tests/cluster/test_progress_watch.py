"""A worker that stands still is found out, one that is merely slow or idle is not; the supervisor starts it again."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from unittest import mock

import pytest
from fakes.liveness import alive
from fakes.oracle_cluster import Pace, Streams, oracle_request, oracle_worker, wait_running

from penstock.cluster import local
from penstock.cluster.local import LocalCluster
from penstock.cluster.progress_watch import Patience, standstill, until_stuck
from penstock.router.settings import AdmissionSettings, RouterSettings
from penstock.workers.protocol import Role
from penstock.workers.settings import WorkerSettings

HASTY = Patience(look_s=0.2, silent_s=1.0)


@pytest.mark.parametrize(
    ("step", "age_s", "predicted_s", "stuck"),
    [
        (100, 0.0, 0.1, False),
        (100, 19.0, 0.1, False),
        (100, 21.0, 0.1, True),
        (100, 29.0, 10.0, False),
        (100, 31.0, 10.0, True),
        (2, 60.0, 0.1, False),
        (2, 121.0, 0.1, True),
    ],
)
def test_a_step_is_judged_by_what_it_should_take(step: int, age_s: float, predicted_s: float, stuck: bool) -> None:
    load = {"step": step, "step_age_s": age_s, "predicted_step_s": predicted_s}
    assert bool(standstill(load, Patience())) is stuck


@pytest.mark.timeout(60)
def test_a_stopped_worker_is_ended_and_started_again_while_another_takes_its_streams(tmp_path: Path) -> None:
    """Its process lives, so nothing but the watch would ever end it."""

    async def scenario() -> None:
        pace = Pace(step_s=0.005)
        router = RouterSettings(admission=AdmissionSettings(ttft_target_s=60.0))
        workers = [oracle_worker(Role.MIXED, index, pace) for index in (0, 1)]
        async with LocalCluster(workers, router, log_file=tmp_path / "log") as cluster:
            streams = Streams(cluster)
            running = asyncio.ensure_future(streams.run([oracle_request(n, 20, 400, pace) for n in range(20)]))
            await wait_running(cluster, "mixed-0")
            (stopped,) = cluster.process("mixed-0").pids
            os.kill(stopped, signal.SIGSTOP)
            tally = await asyncio.wait_for(running, 40)
            assert (tally.completed, tally.wrong) == (20, []), tally.line()
            async with asyncio.timeout(20):
                roster = cluster.supervisor.roster
                while roster.entries[0].restarts == 0:
                    roster = await cluster.supervisor.watch(roster.version, 1.0)
            assert await cluster.wait_ready(20)
            assert not alive(stopped)

    def watched(settings: WorkerSettings, address: str) -> object:
        return until_stuck(settings, address, HASTY)

    with mock.patch.object(local, "until_stuck", watched):
        asyncio.run(scenario())
