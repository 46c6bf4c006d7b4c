"""Ranks of live workers that share experts are killed or stopped under load: the others go on, and no token changes.

Every rank is a process; requests go over the data plane. What ends a whole group is judged in `test_rank_faults.py`.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fakes.expert_worker import (
    Answers,
    Streams,
    expert_checkpoint,
    expert_request,
    expert_worker,
    undisturbed,
    until_status,
)
from fakes.liveness import alive
from fakes.oracle_cluster import leaked_blocks

from penstock.cluster.local import LocalCluster
from penstock.cluster.subprocess_host import WorkerProcess
from penstock.router.settings import AdmissionSettings, PlacementSettings, RouterSettings
from penstock.workers.protocol import GenerateRequest, Role, Tokens
from penstock.workers.settings import WorkerSettings

RANKS, STREAMS, TOKENS, TEXTS = 4, 24, 60, 2
ALWAYS_SPLIT = RouterSettings(PlacementSettings(local_prefill_tokens=0), AdmissionSettings(ttft_target_s=120.0))
MOST_STALL_S = 3.0  # on any machine; tests/benchmarks/expert_survival.py holds it to one second
pytestmark = pytest.mark.timeout(120)

Fault = Callable[[WorkerProcess], Awaitable[None]]


class Plant:
    """One checkpoint, and what one rank that nobody disturbs answers."""

    def __init__(self, directory: Path) -> None:
        self.model_dir = expert_checkpoint(directory / "model")
        self._log = directory / "log"
        self._texts: dict[int, list[list[Tokens]]] = {}

    def requests(self, tokens: int = TOKENS, wave: int = 0) -> list[GenerateRequest]:
        """Every other wave asks the same again: what of it is cached, and what went with a rank, must not matter."""
        seed = wave % TEXTS
        return [expert_request(number, tokens, seed=seed) for number in range(STREAMS)]

    def texts(self, tokens: int = TOKENS, wave: int = 0) -> list[Tokens]:
        if tokens not in self._texts:
            waves = [self.requests(tokens, each) for each in range(TEXTS)]
            self._texts[tokens] = asyncio.run(undisturbed(self.model_dir, waves, self._log))
        return self._texts[tokens][wave % TEXTS]


@pytest.fixture(scope="module")
def plant(tmp_path_factory: pytest.TempPathFactory) -> Plant:
    return Plant(tmp_path_factory.mktemp("experts"))


class Drill:
    """A cluster under streams; afterwards no block is held, no process is left and no worker was started again."""

    def __init__(
        self,
        plant: Plant,
        workers: Sequence[WorkerSettings],
        log: Path,
        first_fault_at: int = STREAMS * 12,
        **cluster: Any,
    ) -> None:
        """`first_fault_at`: tokens of all streams after which the first fault comes."""
        self.plant = plant
        self._fault_at = first_fault_at
        self.log = log
        self.victim = workers[-1].worker_id
        self._cluster = LocalCluster(workers, log_file=log, **cluster)

    def run(self, *waves: Fault, tokens: int = TOKENS) -> list[Answers]:
        """One wave of streams for each fault, which comes when the wave is well under way."""
        return asyncio.run(asyncio.wait_for(self._run(waves, tokens), 100))

    def logged(self, words: str) -> list[str]:
        return [line for line in self.log.read_text().splitlines() if words in line]

    async def _run(self, waves: Sequence[Fault], tokens: int) -> list[Answers]:
        found = []
        async with self._cluster as cluster:
            pids = [pid for status in cluster.fleet.workers() for pid in status.pids]
            for number, fault in enumerate(waves):
                streams = Streams(cluster, self.plant.requests(tokens, number))
                await streams.until_tokens(STREAMS * 12 if number else self._fault_at)
                await fault(cluster.process(self.victim))
                found.append(await streams.ended())
                print(f"longest gap {found[-1].longest_gap_s:.2f} s, failed {found[-1].failed}")
            assert await leaked_blocks(cluster) == 0
            assert all(status.state == "ready" and not status.restarts for status in cluster.fleet.workers())
            self.statuses = list(cluster.fleet.workers())
        assert [pid for pid in pids if alive(pid)] == []
        return found


def signals(number: int, *ranks: int) -> Fault:
    async def fault(process: WorkerProcess) -> None:
        for rank in ranks:
            process.signal(number, rank)

    return fault


async def nothing(_: WorkerProcess) -> None:
    """No fault."""


def require_right(plant: Plant, answers: Sequence[Answers], tokens: int = TOKENS) -> None:
    for number, wave in enumerate(answers):
        assert wave.failed == []
        assert wave.wrong(plant.texts(tokens, number)) == 0


def test_a_killed_rank_costs_no_stream_and_no_token(plant: Plant, tmp_path: Path) -> None:
    """And neither does the next, nor what is asked of the ranks that are left."""
    drill = Drill(plant, [expert_worker(plant.model_dir, RANKS)], tmp_path / "log")
    found = drill.run(signals(signal.SIGKILL, 2), signals(signal.SIGKILL, 1), nothing)
    require_right(plant, found)
    assert max(wave.longest_gap_s for wave in found) < MOST_STALL_S
    (status,) = drill.statuses
    assert status.ranks_lost == 2
    assert status.totals.blocks_lost == 2 * 256
    assert status.kv_blocks == 2 * 256
    assert status.totals.experts_gone == 0
    assert status.totals.expert_skew >= 1.0
    assert drill.logged("goes on without rank 2, with 3 ranks")
    assert drill.logged("goes on without rank 1, with 2 ranks")


@pytest.mark.slow
def test_a_stopped_rank_is_ended_and_costs_no_stream(plant: Plant, tmp_path: Path) -> None:
    drill = Drill(plant, [expert_worker(plant.model_dir, RANKS)], tmp_path / "log")
    found = drill.run(signals(signal.SIGSTOP, 3), nothing)
    require_right(plant, found)
    assert found[0].longest_gap_s < 2.0 + MOST_STALL_S
    assert drill.statuses[0].ranks_lost == 1


@pytest.mark.slow
def test_a_rank_that_stands_still_every_now_and_then_is_ended(plant: Plant, tmp_path: Path) -> None:
    drill = Drill(plant, [expert_worker(plant.model_dir, RANKS)], tmp_path / "log")

    async def stutter(process: WorkerProcess) -> None:
        for _ in range(40):
            process.signal(signal.SIGSTOP, 1)
            await asyncio.sleep(0.15)
            process.signal(signal.SIGCONT, 1)
            await asyncio.sleep(0.02)

    require_right(plant, drill.run(stutter, tokens=300), 300)
    assert drill.statuses[0].ranks_lost == 1
    assert drill.logged("goes on without rank 1")


@pytest.mark.slow
def test_two_ranks_at_once(plant: Plant, tmp_path: Path) -> None:
    drill = Drill(plant, [expert_worker(plant.model_dir, RANKS)], tmp_path / "log")
    require_right(plant, drill.run(signals(signal.SIGKILL, 1, 3), nothing))
    assert drill.statuses[0].ranks_lost == 2


@pytest.mark.slow
def test_all_but_the_first_are_stopped_one_after_the_other(plant: Plant, tmp_path: Path) -> None:
    drill = Drill(plant, [expert_worker(plant.model_dir, RANKS)], tmp_path / "log")
    stops = [signals(signal.SIGSTOP, rank) for rank in (1, 2, 3)]
    require_right(plant, drill.run(*stops, nothing))
    assert drill.statuses[0].ranks_lost == 3


@pytest.mark.slow
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_rank_is_killed_while_experts_move(rank: int, plant: Plant, tmp_path: Path) -> None:
    """A round starts every four steps, so that there is always one."""
    worker = expert_worker(plant.model_dir, RANKS, expert_rebalance_steps=4)
    drill = Drill(plant, [worker], tmp_path / "log")
    require_right(plant, drill.run(signals(signal.SIGKILL, rank), nothing))
    assert drill.logged("experts move")


@pytest.mark.slow
def test_experts_without_a_copy_are_refilled_before_a_step_needs_them(plant: Plant, tmp_path: Path) -> None:
    worker = expert_worker(plant.model_dir, RANKS, redundant_experts=0)
    drill = Drill(plant, [worker], tmp_path / "log")
    found = drill.run(signals(signal.SIGKILL, 2), nothing)
    require_right(plant, found)
    assert drill.logged("no rank holds layer 0: experts")
    assert drill.logged("the step waits until they are refilled")
    assert drill.logged("every expert is held again")
    assert drill.statuses[0].totals.experts_gone == 0


@pytest.mark.slow
def test_steps_go_on_without_lost_experts_where_that_is_asked_for(plant: Plant, tmp_path: Path) -> None:
    """Texts may change while experts are gone; those of later requests are right again."""
    worker = expert_worker(plant.model_dir, RANKS, redundant_experts=0, lost_experts="degrade")
    drill = Drill(plant, [replace(worker, kv=replace(worker.kv, prefix_caching=False))], tmp_path / "log")
    found = drill.run(signals(signal.SIGKILL, 2), nothing)
    assert [wave.failed for wave in found] == [[], []]
    assert [len(text) for text in found[0].texts] == [TOKENS] * STREAMS
    assert found[1].wrong(plant.texts(TOKENS, 1)) == 0
    assert not drill.logged("the step waits")
    assert drill.logged("every expert is held again")


@pytest.mark.slow
@pytest.mark.parametrize("victim", [Role.PREFILL, Role.DECODE])
def test_a_rank_that_sends_or_takes_kv_is_killed(victim: Role, plant: Plant, tmp_path: Path) -> None:
    """Hand-overs that it had part in are made again; no block of any bank stays held."""
    roles = [role for role in (Role.PREFILL, Role.DECODE) if role is not victim]
    workers = [expert_worker(plant.model_dir, 2, role) for role in (*roles, victim)]
    drill = Drill(plant, workers, tmp_path / "log", router=ALWAYS_SPLIT)

    async def early(process: WorkerProcess) -> None:
        process.signal(signal.SIGKILL, 1)

    require_right(plant, drill.run(early, nothing))
    assert drill.statuses[-1].ranks_lost == 1
    assert drill.statuses[0].ranks_lost == 0


@pytest.mark.slow
@pytest.mark.parametrize("experts", [True, False])
@pytest.mark.parametrize("rank", [1, 3])
def test_prompts_that_ranks_compute_together(rank: int, experts: bool, plant: Plant, tmp_path: Path) -> None:
    """A rank is killed while they do, chunk by chunk; ranks that have all experts themselves go on as well."""
    together = {"context_parallel_size": RANKS, "context_parallel_threshold": 16}
    alone = {} if experts else {"expert_parallel_size": 1, "redundant_experts": 0}
    worker = expert_worker(plant.model_dir, RANKS, **together, **alone)
    worker = replace(worker, scheduler=replace(worker.scheduler, long_prefill_token_threshold=16))
    drill = Drill(plant, [worker], tmp_path / "log", first_fault_at=1)
    require_right(plant, drill.run(signals(signal.SIGKILL, rank), nothing))
    assert drill.statuses[0].ranks_lost == 1


@pytest.mark.slow
def test_an_idle_group_goes_on_too(plant: Plant, tmp_path: Path) -> None:
    async def scenario() -> None:
        worker = expert_worker(plant.model_dir, RANKS, redundant_experts=0)
        async with LocalCluster([worker], log_file=tmp_path / "log") as cluster:
            cluster.process("mixed-0").signal(signal.SIGSTOP, 3)
            lost = await until_status(
                cluster, lambda status: status.totals.blocks_lost and not status.totals.experts_gone
            )
            assert lost.kv_blocks == 3 * 256
            answers = await Streams(cluster, plant.requests()).ended()
            assert answers.failed == []
            assert answers.wrong(plant.texts()) == 0

    wanted = plant.texts()  # before this loop runs
    assert len(wanted) == STREAMS
    asyncio.run(asyncio.wait_for(scenario(), 90))


@pytest.mark.slow
def test_experts_follow_the_load_while_they_serve(tmp_path: Path) -> None:
    """A power-law router over 16 experts; no text changes when they move."""
    model_dir = expert_checkpoint(tmp_path / "model", experts=16, favour=1.2)
    requests = [expert_request(number, 200, sampled=True) for number in range(48)]
    (wanted,) = asyncio.run(undisturbed(model_dir, [requests], tmp_path / "log"))
    worker = expert_worker(model_dir, RANKS, redundant_experts=1, expert_rebalance_steps=40)

    async def scenario() -> list[float]:
        said: list[float] = []
        async with LocalCluster([replace(worker, heartbeat_s=0.05)], log_file=tmp_path / "log") as cluster:
            streams = Streams(cluster, requests)
            ending = asyncio.ensure_future(streams.ended())
            while not ending.done():
                await asyncio.sleep(0.02)
                status = cluster.fleet.workers()[0]
                if status.step < 40 and status.step:
                    said = [status.totals.expert_skew]
            answers = await ending
            assert answers.failed == []
            assert answers.wrong(wanted) == 0
            return [*said, cluster.fleet.workers()[0].totals.expert_skew]

    before, after = asyncio.run(asyncio.wait_for(scenario(), 100))
    assert before > 1.4, "there is something to level"
    assert after <= 1.2


@pytest.mark.slow
def test_the_first_rank_takes_the_others_with_it(plant: Plant, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with LocalCluster([expert_worker(plant.model_dir, 2)], log_file=tmp_path / "log") as cluster:
            before = cluster.process("mixed-0").pids
            streams = Streams(cluster, plant.requests())
            await streams.until_tokens(STREAMS * 4)
            cluster.process("mixed-0").signal(signal.SIGKILL, 0)
            answers = await streams.ended()
            assert [pid for pid in before if alive(pid)] == []
            assert answers.failed == []
            assert answers.wrong(plant.texts()) == 0
            assert (await until_status(cluster, lambda status: status.state == "ready")).restarts == 1

    wanted = plant.texts()
    assert len(wanted) == STREAMS
    asyncio.run(asyncio.wait_for(scenario(), 90))
