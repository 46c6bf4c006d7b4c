"""Workers are taken away under 200 oracle streams: what runs there goes on elsewhere with its KV, nothing fails."""

from __future__ import annotations

import asyncio
import dataclasses
from collections import Counter
from pathlib import Path

import pytest
from fakes.in_ci import every
from fakes.liveness import alive
from fakes.oracle_cluster import PATIENT, Pace, Streams, leaked_blocks, oracle_request, oracle_workers

from penstock.cluster.local import LocalCluster
from penstock.router.journey import RequestReport
from penstock.router.live_moves import LiveMove
from penstock.router.settings import MoveSettings, PlacementSettings, RouterSettings

STREAMS = 200
ALWAYS_SPLIT = PlacementSettings(local_prefill_tokens=0)


def requests(pace: Pace, output_tokens: int) -> list:
    return [oracle_request(n, 10 + n % 60, output_tokens, pace) for n in range(STREAMS)]


class Drained:
    """One cluster, its streams and what was reported of them."""

    def __init__(
        self,
        folder: Path,
        prefill: int,
        decode: int,
        pace: Pace,
        *,
        drain_s: float = 30.0,
        moves: MoveSettings | None = None,
        output_tokens: int = 150,
    ) -> None:
        self.reports: list[RequestReport] = []
        self.pace = pace
        self.output_tokens = output_tokens
        workers = [dataclasses.replace(each, drain_s=drain_s) for each in oracle_workers(prefill, decode, pace)]
        router = RouterSettings(ALWAYS_SPLIT, PATIENT, moves=moves or MoveSettings())
        self.cluster = LocalCluster(workers, router, log_file=folder / "log", observe=self.reports.append)
        self.streams = Streams(self.cluster)

    async def run(self, tokens_before: int, disturb) -> None:
        """All streams; `disturb` runs once so many tokens are out. All must be right, and no block be lost."""
        async with self.cluster as cluster:
            running = asyncio.ensure_future(self.streams.run(requests(self.pace, self.output_tokens)))
            await self.streams.until_tokens(tokens_before)
            pids = {pid for status in cluster.fleet.workers() for pid in status.pids}
            await disturb(cluster)
            tally = await asyncio.wait_for(running, 60)
            print(
                f"{tally.line()}; moved {self.moved}, recomputed {self.recomputed}, failed attempts {self.failed}, "
                f"ended {dict(self.ends)}"
            )
            assert tally.completed == STREAMS
            assert tally.wrong == []
            assert await leaked_blocks(cluster) == 0
            await cluster.stop()
            assert [pid for pid in pids if alive(pid)] == []

    @property
    def moved(self) -> int:
        return sum(report.live_moves for report in self.reports)

    @property
    def recomputed(self) -> int:
        return sum(report.recomputed_tokens for report in self.reports)

    @property
    def ends(self) -> Counter[tuple[str, str, str | None]]:
        """Of attempts that did not complete: how, in which phase, and who was to compute the prompt."""
        trails = [attempt for report in self.reports for attempt in report.trail.attempts]
        return Counter((each.end, each.phase, each.prefill) for each in trails if each.end != "completed")

    @property
    def failed(self) -> int:
        return sum(report.migrations for report in self.reports)


async def end_worker(cluster: LocalCluster, worker_id: str, limit_s: float = 30.0) -> float:
    """As a controller lets one go; seconds until it was gone."""
    began = asyncio.get_running_loop().time()
    await cluster.supervisor.remove(worker_id, limit_s)
    return asyncio.get_running_loop().time() - began


@pytest.mark.timeout(120)
@pytest.mark.parametrize("transport", every(2, ["tcp", "shared_memory"]))
def test_a_decode_worker_that_drains_gives_its_streams_away(transport: str, tmp_path: Path) -> None:
    drained = Drained(tmp_path, 1, 3, Pace(transport=transport, step_s=0.02, num_blocks=32768), output_tokens=400)

    async def disturb(cluster: LocalCluster) -> None:
        took_s = await end_worker(cluster, "decode-0")
        print(f"decode-0 was gone after {took_s:.2f} s")
        assert drained.streams.live, "it waited for its streams to end"

    asyncio.run(drained.run(STREAMS * 5, disturb))
    assert drained.moved > 0
    assert drained.recomputed == drained.failed == 0


@pytest.mark.timeout(120)
def test_a_prefill_worker_that_drains_waits_for_its_blocks_to_be_taken(tmp_path: Path) -> None:
    drained = Drained(tmp_path, 2, 2, Pace(step_s=0.004, token_s=0.0004))

    async def disturb(cluster: LocalCluster) -> None:
        await end_worker(cluster, "prefill-0")

    asyncio.run(drained.run(20, disturb))
    assert drained.recomputed == 0
    assert drained.ends, "nobody was turned away"
    assert {phase for _, phase, _ in drained.ends} == {"prefill"}, "what was computed got lost"


@pytest.mark.timeout(120)
def test_what_is_left_at_the_limit_is_computed_again_elsewhere(tmp_path: Path) -> None:
    drained = Drained(tmp_path, 1, 2, Pace(step_s=0.01), drain_s=0.3, moves=MoveSettings(at_once=0))

    async def disturb(cluster: LocalCluster) -> None:
        assert await end_worker(cluster, "decode-0", 1.0) < 5.0

    asyncio.run(drained.run(STREAMS * 5, disturb))
    assert drained.failed > 0


@pytest.mark.slow  # router/test_live_moves.py kills workers in the middle of moves, under a virtual clock
@pytest.mark.timeout(120)
@pytest.mark.parametrize("victim", ["source", "target"])
def test_a_worker_killed_in_the_middle_of_a_move(victim: str, tmp_path: Path) -> None:
    drained = Drained(tmp_path, 1, 3, Pace(step_s=0.02, num_blocks=32768), output_tokens=400)

    async def disturb(cluster: LocalCluster) -> None:
        draining = asyncio.ensure_future(end_worker(cluster, "decode-0"))
        router = cluster.generator.router
        sent: list[LiveMove] = []
        while not (sent or draining.done()):
            await asyncio.sleep(0)
            sent = [journey.move for journey in router._journeys if journey.move is not None and journey.move.sent]
        assert sent, f"nobody was on the way: {cluster.fleet.workers()}"
        cluster.kill(sent[0].source if victim == "source" else sent[0].target)
        await draining

    asyncio.run(drained.run(STREAMS * 5, disturb))
