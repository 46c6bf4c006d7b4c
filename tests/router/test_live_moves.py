"""Running sequences that go on at another worker with their KV: drains, pressure, and everything that can go wrong."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import random

import pytest
from fakes.in_ci import every
from fakes.virtual_clock import run_virtual
from fakes.virtual_cluster import Served, Shape, VirtualCluster, oracle_request
from fakes.virtual_worker import VirtualWorker

from penstock.router.live_moves import LiveMove
from penstock.router.settings import MoveSettings, PlacementSettings, RouterSettings
from penstock.workers.protocol import Role, Started, ToRouter

SPLIT = {"p0": Role.PREFILL, "d0": Role.DECODE, "d1": Role.DECODE}
MIXED = {"m0": Role.MIXED, "m1": Role.MIXED, "m2": Role.MIXED}
ROOMY = Shape(num_blocks=2048)
ALWAYS_SPLIT = RouterSettings(placement=PlacementSettings(local_prefill_tokens=0))


def longer(number: int, prompt_tokens: int = 40, max_tokens: int = 120):
    return oracle_request(number, prompt_tokens, max_tokens=max_tokens)


async def begun(cluster: VirtualCluster, count: int, tokens: int = 10) -> list[asyncio.Task[Served]]:
    """Streams that have some tokens each."""
    rows, all_begun = [0] * count, asyncio.Event()

    def progress(number: int) -> None:
        rows[number] += 1
        if min(rows) >= tokens:
            all_begun.set()

    served = [cluster.submit(longer(number), functools.partial(progress, number)) for number in range(count)]
    await all_begun.wait()
    return served


async def all_right(cluster: VirtualCluster, tasks: list[asyncio.Task[Served]]) -> list[Served]:
    served = list(await asyncio.gather(*tasks))
    assert [each.error for each in served] == [None] * len(served)
    assert all(each.right for each in served)
    await cluster.assert_quiet()
    return served


def move_away(cluster: VirtualCluster, worker_id: str) -> int:
    """Ask every stream of this worker to leave, as a drain does, while the worker serves on."""
    asked = 0
    for journey in cluster.router._journeys:
        if journey.settled and journey.move is None and journey.route is not None and journey.route.decode == worker_id:
            journey.leaving = True
            journey.nudge()
            asked += 1
    return asked


def under_way(cluster: VirtualCluster, *, sent: bool = False) -> list[LiveMove]:
    moves = [journey.move for journey in cluster.router._journeys if journey.move is not None]
    return [move for move in moves if move.sent or not sent]


async def until_under_way(cluster: VirtualCluster, count: int) -> None:
    while len(under_way(cluster, sent=True)) < count:  # noqa: ASYNC110 - the clock is virtual
        await asyncio.sleep(0.0005)


@pytest.mark.parametrize("roles", [SPLIT, MIXED])
def test_a_drain_moves_every_stream_and_computes_nothing_again(roles: dict[str, Role]) -> None:
    async def scenario() -> None:
        async with VirtualCluster(roles, ROOMY, settings=ALWAYS_SPLIT) as cluster:
            tasks = await begun(cluster, 16)
            leaving = max(roles, key=lambda name: cluster.workers[name].engine.load().running)
            held = cluster.workers[leaving].engine.load().running
            cluster.drain(leaving)
            await asyncio.sleep(0.25)
            assert cluster.workers[leaving].engine.drained
            assert not any(task.done() for task in tasks)
            await all_right(cluster, tasks)
            assert sum(report.live_moves for report in cluster.reports) == held > 0
            assert all(report.recomputed_tokens == report.migrations == 0 for report in cluster.reports)

    run_virtual(scenario())


def test_what_has_no_room_elsewhere_is_finished_where_it_is() -> None:
    async def scenario() -> None:
        async with VirtualCluster({"m0": Role.MIXED}, ROOMY) as cluster:
            tasks = await begun(cluster, 4)
            cluster.drain("m0")
            await all_right(cluster, tasks)
            assert sum(report.live_moves for report in cluster.reports) == 0

    run_virtual(scenario())


def test_moves_are_counted_by_what_became_of_them() -> None:
    async def scenario() -> None:
        async with VirtualCluster(SPLIT, ROOMY, settings=ALWAYS_SPLIT) as cluster:
            tasks = await begun(cluster, 12)
            asked = move_away(cluster, "d0")
            await until_under_way(cluster, 2)
            await all_right(cluster, tasks)
            moved = sum(report.live_moves for report in cluster.reports)
            assert 0 < moved <= asked
            begins = moved + sum(report.moves_stayed for report in cluster.reports)
            assert 2 <= begins <= asked
            assert sum(report.moves_failed for report in cluster.reports) == 0

    run_virtual(scenario())


def test_a_stream_lost_on_its_way_counts_as_a_failed_move() -> None:
    async def scenario() -> None:
        async with VirtualCluster({**SPLIT, "d2": Role.DECODE}, ROOMY, settings=ALWAYS_SPLIT) as cluster:
            tasks = await begun(cluster, 12)
            move_away(cluster, "d0")
            await until_under_way(cluster, 2)
            for name in ("d0", "d1", "d2"):
                cluster.kill(name, restart_s=0.2)
            await all_right(cluster, tasks)
            assert sum(report.moves_failed for report in cluster.reports) > 0

    run_virtual(scenario())


def test_a_start_that_its_tokens_overtake_still_says_what_was_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    arrive = VirtualWorker._arrive

    def late(worker: VirtualWorker, message: ToRouter) -> None:
        delay_s = 0.0004 if isinstance(message, Started) else 0.0
        if delay_s:
            worker.cluster.later(delay_s, functools.partial(arrive, worker, message))
        else:
            arrive(worker, message)

    async def scenario() -> None:
        async with VirtualCluster(SPLIT, ROOMY, settings=ALWAYS_SPLIT) as cluster:
            for number in range(2):
                await cluster.submit(dataclasses.replace(longer(0), request_id=f"again-{number}"))
            assert [report.cached_tokens for report in cluster.reports] == [0, 39]

    monkeypatch.setattr(VirtualWorker, "_arrive", late)
    run_virtual(scenario())


@pytest.mark.parametrize("victim", ["source", "target"])
@pytest.mark.parametrize("wait_s", [0.0, 0.002, 0.004, 0.006, 0.008, 0.012])
def test_a_worker_that_dies_in_the_middle_of_moves_costs_no_request(victim: str, wait_s: float) -> None:
    async def scenario() -> None:
        async with VirtualCluster(SPLIT, ROOMY, settings=ALWAYS_SPLIT) as cluster:
            tasks = await begun(cluster, 12)
            assert move_away(cluster, "d0")
            await until_under_way(cluster, 2)
            await asyncio.sleep(wait_s)
            cluster.kill("d0" if victim == "source" else "d1", restart_s=0.3)
            await all_right(cluster, tasks)

    run_virtual(scenario())


def test_streams_whose_reader_leaves_in_the_middle_of_a_move_leave_nothing_behind() -> None:
    async def scenario() -> None:
        async with VirtualCluster(SPLIT, ROOMY, settings=ALWAYS_SPLIT) as cluster:
            tasks = await begun(cluster, 12)
            move_away(cluster, "d0")
            await until_under_way(cluster, 2)
            for task in tasks[::2]:
                task.cancel()
            await asyncio.gather(*tasks[::2], return_exceptions=True)
            await all_right(cluster, tasks[1::2])

    run_virtual(scenario())


@pytest.mark.parametrize("seed", every(3, range(12)))
def test_moves_deaths_and_cancels_in_any_order(seed: int) -> None:
    """Every text right, every block back, whatever meets whatever."""

    async def scenario() -> None:
        rng = random.Random(seed)
        roles = {**SPLIT, "d2": Role.DECODE}
        async with VirtualCluster(roles, ROOMY, settings=ALWAYS_SPLIT) as cluster:
            tasks = [cluster.submit(longer(number, 20 + number, 200)) for number in range(24)]
            kept = list(tasks)
            for _ in range(40):
                await asyncio.sleep(rng.random() * 0.02)
                decode = rng.choice(["d0", "d1", "d2"])
                dice = rng.random()
                if dice < 0.75:
                    move_away(cluster, decode)
                elif dice < 0.85 and len(kept) > 12:
                    gone = kept.pop(rng.randrange(len(kept)))
                    gone.cancel()
                    await asyncio.gather(gone, return_exceptions=True)
                elif len(cluster.kills) < 3:
                    cluster.kill(decode, restart_s=0.2)
            await all_right(cluster, kept)
            assert sum(report.live_moves for report in cluster.reports) > 0

    run_virtual(scenario())


def test_a_worker_short_of_kv_gives_some_sequences_to_one_with_room() -> None:
    async def scenario() -> None:
        settings = RouterSettings(moves=MoveSettings(short_s=0.1, room_share=0.2))
        roles = {"m0": Role.MIXED}
        shape = Shape(num_blocks=250, heartbeat_s=0.05, max_num_seqs=16)
        async with VirtualCluster(roles, shape, settings=settings) as cluster:
            tasks = [cluster.submit(longer(number, 60, 400)) for number in range(4)]
            await asyncio.sleep(0.5)
            cluster.roles["m1"] = Role.MIXED
            cluster.start("m1")
            await all_right(cluster, tasks)
            moved = sum(report.live_moves for report in cluster.reports)
            assert 0 < moved <= 4

    run_virtual(scenario())
