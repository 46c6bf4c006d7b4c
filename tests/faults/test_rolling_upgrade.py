"""Every worker of the version before is replaced by one of this version, one by one, under load: nothing fails."""

from __future__ import annotations

import asyncio
import random
import sys
import time
from pathlib import Path

import pytest
from fakes.liveness import alive
from fakes.oracle_cluster import PATIENT, Pace, Streams, oracle_request, oracle_worker

from penstock.cluster.config import ClusterIdentity
from penstock.cluster.editions import ActorNeeds, Edition
from penstock.cluster.fleet_plan import FleetPlan
from penstock.cluster.local import LocalCluster
from penstock.cluster.roster import WorkerState
from penstock.cluster.subprocess_host import SubprocessHost, WorkerProcess
from penstock.cluster.supervision import Supervisor
from penstock.router.journey import RequestReport
from penstock.router.settings import PlacementSettings, RouterSettings
from penstock.workers.protocol import OLDEST_WIRE_VERSION, WIRE_VERSION, Role
from penstock.workers.settings import WorkerSettings

OLDER_WORKER = Path(__file__).parents[1] / "fakes" / "older_worker.py"
COUNTS = {Role.PREFILL: 1, Role.DECODE: 2, Role.MIXED: 0}
PACE = Pace(step_s=0.012, max_num_seqs=24)  # slow enough for a busy machine to keep it
OUTPUT_TOKENS = 200
LOAD = 0.7


class UpgradingHost:
    """Starts workers of the version before until `upgraded` is set."""

    def __init__(self, log_file: Path) -> None:
        self.upgraded = False
        self._now = SubprocessHost(log_file)
        self._before = SubprocessHost(log_file, (sys.executable, str(OLDER_WORKER)))

    async def start(self, settings: WorkerSettings) -> WorkerProcess:
        return await (self._now if self.upgraded else self._before).start(settings)


class UpgradedCluster(LocalCluster):
    """A local cluster whose fleet follows a plan, as the controller's does."""

    def __init__(self, plan: FleetPlan, host: UpgradingHost, reports: list[RequestReport]) -> None:
        self.plan = plan
        members = plan.steps(_nobody(), {"e"}, ()).start
        workers = [_settings(plan, member.worker_id, member.role) for member in members]
        router = RouterSettings(PlacementSettings(local_prefill_tokens=0), PATIENT)
        super().__init__(workers, router, host=host, observe=reports.append)  # type: ignore[arg-type]  # starts alike

    async def roll(self) -> None:
        """Follow the plan until every member has been replaced."""
        self.plan.roll()
        removing: list[asyncio.Task[None]] = []
        while True:
            steps = self.plan.steps(self.supervisor.roster, {"e"}, ())
            for member in steps.start:
                self.supervisor.add(_settings(self.plan, member.worker_id, member.role), "e")
            removing += [asyncio.ensure_future(self.supervisor.remove(each.worker_id, 30.0)) for each in steps.stop]
            entries = self.supervisor.roster.entries
            if not self.plan.rolling and all(entry.state is WorkerState.READY for entry in entries):
                await asyncio.gather(*removing)
                return
            await self.supervisor.watch(self.supervisor.roster.version, 0.5)


def _nobody():
    return Supervisor(None, ()).roster  # type: ignore[arg-type]  # nobody is ever started by it


def _settings(plan: FleetPlan, worker_id: str, role: Role) -> WorkerSettings:
    edition = plan.targets["e"].edition
    return edition.worker(worker_id, role, ClusterIdentity("local", "ab" * 32))


async def _arrivals(streams: Streams, rate: float, stop: asyncio.Event) -> None:
    """Requests at random times, until told to stop; then to their ends."""
    rng, tasks, number, began = random.Random(1), [], 0, time.monotonic()
    due = 0.0
    while not stop.is_set():
        due += rng.expovariate(rate)
        await asyncio.sleep(max(0.0, began + due - time.monotonic()))
        request = oracle_request(number, 10 + number % 60, OUTPUT_TOKENS, PACE)
        tasks.append(asyncio.ensure_future(streams.run_one(number, request)))
        number += 1
    await asyncio.gather(*tasks)


@pytest.mark.timeout(180)
def test_all_workers_are_replaced_by_a_newer_version_under_load(tmp_path: Path) -> None:
    async def scenario() -> None:
        host, reports = UpgradingHost(tmp_path / "log"), []
        plan = FleetPlan()
        plan.apply(Edition("e", oracle_worker(Role.MIXED, 0, PACE).to_json(), ActorNeeds()), COUNTS)
        async with UpgradedCluster(plan, host, reports) as cluster:
            views = cluster.generator.router.fleet.workers
            assert {view.welcome.wire_version for view in views.values()} == {OLDEST_WIRE_VERSION}
            pids = {pid for status in cluster.fleet.workers() for pid in status.pids}
            streams, stop = Streams(cluster), asyncio.Event()
            capacity = COUNTS[Role.DECODE] * PACE.max_num_seqs / (OUTPUT_TOKENS * PACE.step_s)
            load = asyncio.ensure_future(_arrivals(streams, LOAD * capacity, stop))
            await streams.until_tokens(1000)
            host.upgraded = True
            began = time.monotonic()
            await cluster.roll()
            took_s, live = time.monotonic() - began, len(streams.live)
            assert await cluster.wait_ready(20)
            assert {view.welcome.wire_version for view in views.values()} == {WIRE_VERSION}
            await cluster.roll()  # now between workers of one version: what runs moves with its KV
            stop.set()
            await asyncio.wait_for(load, 60)
            tally, moved = streams.tally, sum(report.live_moves for report in reports)
            recomputed = sum(report.recomputed_tokens for report in reports)
            print(
                f"replaced in {took_s:.1f} s with {live} streams live; {tally.line()}; "
                f"moved {moved}, recomputed {recomputed}"
            )
            assert tally.failed == {}
            assert tally.wrong == []
            assert tally.completed == len(reports) > 0
            assert recomputed == 0
            assert moved > 0
            assert [pid for pid in pids if alive(pid)] == []

    asyncio.run(scenario())
