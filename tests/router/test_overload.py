"""A fleet that is too small for a while, under a virtual clock: workers lost at high load, none left, coming and going.

Whatever happens, a request is served whole, or refused with a reason and within its target.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter

import pytest
from fakes.virtual_clock import run_virtual
from fakes.virtual_cluster import Served, Shape, VirtualCluster, oracle_request

from penstock.router.settings import AdmissionSettings, RouterSettings
from penstock.workers.errors import RefusedError
from penstock.workers.protocol import FailureCode, Role

SHAPE = Shape(step_s=0.1, token_s=0.0, max_num_seqs=4)
OUTPUT = 20
ANSWER_S = (OUTPUT + 1) * SHAPE.step_s
TARGET_S = 4.0
SETTINGS = RouterSettings(admission=AdmissionSettings(ttft_target_s=TARGET_S))


def fleet(workers: int) -> dict[str, Role]:
    return {f"m{index}": Role.MIXED for index in range(workers)}


async def arrivals(
    cluster: VirtualCluster, rate: float, seconds: float, first: int = 0, output: int = OUTPUT, tenant: str = ""
) -> list[Served]:
    """Open loop; everybody's end. Answers are of half to one and a half times the usual length."""
    rng = random.Random(first)
    tasks: list[asyncio.Task[Served]] = []
    until = cluster.now() + seconds
    while cluster.now() < until:
        tokens = rng.randint(output // 2, output * 3 // 2) if tenant else output
        tasks.append(cluster.submit(oracle_request(first + len(tasks), 8, max_tokens=tokens, tenant=tenant)))
        await asyncio.sleep(rng.expovariate(rate))
    return [await task for task in tasks]


def check_ends(served: list[Served]) -> Counter[str]:
    """Each is whole, or refused before its first token by a code that tells of load."""
    ends: Counter[str] = Counter()
    for each in served:
        assert each.right or isinstance(each.error, RefusedError), each.error
        assert each.right or (each.a_prefix and each.emission.count == 0)
        ends["completed" if each.right else each.error.code] += 1  # type: ignore[union-attr]
    return ends


@pytest.mark.timeout(120)
def test_a_third_of_the_workers_dead_for_a_minute_at_nine_tenths_load() -> None:
    """Goodput falls by no more than what is gone, attempts hardly grow, and all is well once they are back."""

    async def scenario() -> None:
        async with VirtualCluster(fleet(6), SHAPE, SETTINGS) as cluster:
            places = 6 * SHAPE.max_num_seqs
            for victim in ("m0", "m1"):
                cluster.later(30.0, lambda name=victim: cluster.kill(name, restart_s=60.0))  # type: ignore[misc]
            begun = cluster.now()
            served = await arrivals(cluster, 0.9 * places / ANSWER_S, 130.0)
            ends = check_ends(served)
            assert set(ends) <= {"completed", FailureCode.OVERLOADED}, ends
            assert ends[FailureCode.OVERLOADED] > 20, "the fault did not fire"

            def goodput(since: float, until: float) -> float:
                done = [each for each in served if each.right and since <= each.done_at - begun < until]
                return len(done) / (until - since)

            before = goodput(10.0, 30.0)
            assert goodput(32.0, 90.0) >= 0.6 * before
            assert goodput(100.0, 130.0) >= 0.9 * before, "it has not recovered ten seconds after their return"
            late_refusals = [each for each in served if not each.right and each.done_at - begun > 100.0]
            assert len(late_refusals) <= 5
            attempts = sum(report.attempts for report in cluster.reports)
            assert attempts < 1.1 * len(served)
            first = [report.times["first_token"] for report in cluster.reports if report.terminal == "completed"]
            kept = sum(seconds <= TARGET_S for seconds in first) / len(first)
            assert kept >= 0.95, kept
            await cluster.assert_quiet()

    run_virtual(scenario())


@pytest.mark.timeout(60)
def test_a_burst_while_nobody_is_left_is_served_as_far_as_time_allows_when_somebody_is_back() -> None:
    async def scenario() -> None:
        async with VirtualCluster(fleet(2), SHAPE, SETTINGS) as cluster:
            for name in cluster.roles:
                cluster.kill(name, restart_s=2.0)
            await asyncio.sleep(0.1)
            served = await asyncio.gather(*(cluster.submit(oracle_request(n, 8, max_tokens=OUTPUT)) for n in range(60)))
            ends = check_ends(served)
            assert ends["completed"] >= 2 * SHAPE.max_num_seqs, ends
            assert ends[FailureCode.OVERLOADED] > 0, ends
            slow = [each.done_at for each in served if not each.right]
            assert max(slow) <= TARGET_S + 1.5, "refused long after it was certain"
            await cluster.assert_quiet()
            last = await cluster.serve(oracle_request(1000, 8, max_tokens=OUTPUT))
            assert last.right
            assert last.report is not None
            assert last.report.times["first_token"] < 3 * SHAPE.step_s

    run_virtual(scenario())


@pytest.mark.timeout(60)
def test_workers_that_come_and_go_all_the_time_lose_nothing_that_was_let_in() -> None:
    async def scenario() -> None:
        async with VirtualCluster(fleet(3), SHAPE, SETTINGS) as cluster:
            for flap in range(12):
                name = f"m{flap % 3}"
                cluster.later(1.0 + 2.5 * flap, lambda name=name: cluster.kill(name, restart_s=1.0))  # type: ignore[misc]
            served = await arrivals(cluster, 0.6 * 3 * SHAPE.max_num_seqs / ANSWER_S, 32.0)
            ends = check_ends(served)
            assert set(ends) <= {"completed", FailureCode.OVERLOADED}, ends
            assert ends["completed"] >= 0.8 * len(served), ends
            assert sum(report.migrations for report in cluster.reports) > 10, "the fault did not fire"
            await cluster.assert_quiet()

    run_virtual(scenario())


@pytest.mark.timeout(100)
@pytest.mark.parametrize(
    ("roles", "shape", "output"),
    [
        ({"p": Role.PREFILL, "d0": Role.DECODE, "d1": Role.DECODE}, Shape(step_s=0.06, max_num_seqs=16), 48),
        (fleet(6), Shape(step_s=0.05, max_num_seqs=8, num_blocks=2048), 200),  # an end every 1.3 s at each worker
    ],
    ids=["short answers", "long answers"],
)
def test_three_times_the_capacity_and_then_a_flood_beside_a_modest_tenant(
    roles: dict[str, Role], shape: Shape, output: int
) -> None:
    """Who is let wait begins in time, all others hear so within a second, and no place stays empty."""
    decoding = sum(role is not Role.PREFILL for role in roles.values())
    capacity = decoding * shape.max_num_seqs / (output * (shape.step_s + shape.token_s * shape.max_num_seqs))
    target_s = 2.0

    async def scenario() -> None:
        settings = RouterSettings(admission=AdmissionSettings(ttft_target_s=target_s))
        async with VirtualCluster(roles, shape, settings) as cluster:

            def check(served: list[Served]) -> int:
                check_ends(served)
                whole = [each for each in served if each.right and each.report is not None]
                first_s = [each.report.times["first_token"] for each in whole if each.report is not None]
                assert sum(seconds <= target_s for seconds in first_s) >= 0.95 * len(whole), sorted(first_s)[-20:]
                refused_s = [each.done_at - each.begun_at for each in served if not each.right]
                assert max(refused_s, default=0.0) <= 1.0
                return len(whole)

            seconds = 25.0
            served = check(await arrivals(cluster, 3 * capacity, seconds, 1, output, "a"))
            assert served >= 0.95 * capacity * seconds
            both = await asyncio.gather(
                arrivals(cluster, 2.5 * capacity, seconds, 10_000, output, "flood"),
                arrivals(cluster, 0.25 * capacity, seconds, 20_000, output, "modest"),
            )
            check(both[0])
            assert check(both[1]) == len(both[1])
            await cluster.assert_quiet()

    run_virtual(scenario())
