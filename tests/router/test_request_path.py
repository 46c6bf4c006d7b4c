"""The life of a request over simulated workers under a virtual clock: every phase, every way to go wrong."""

from __future__ import annotations

import ast
import asyncio
import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest
from fakes.virtual_clock import run_virtual
from fakes.virtual_cluster import Served, Shape, VirtualCluster, oracle_request

from penstock.router.settings import AdmissionSettings, PlacementSettings, RetrySettings, RouterSettings
from penstock.workers.errors import RefusedError
from penstock.workers.oracle import expected_embedding
from penstock.workers.protocol import FailureCode, Role

SPLIT = {"p0": Role.PREFILL, "p1": Role.PREFILL, "d0": Role.DECODE, "d1": Role.DECODE}
MIXED = {"m0": Role.MIXED, "m1": Role.MIXED}
ALWAYS_SPLIT = RouterSettings(placement=PlacementSettings(local_prefill_tokens=0))


def test_all_right() -> None:
    async def scenario() -> None:
        async with VirtualCluster(SPLIT, settings=ALWAYS_SPLIT) as cluster:
            served = await asyncio.gather(*(cluster.submit(oracle_request(n, 5 + n * 3)) for n in range(40)))
            assert all(each.right for each in served)
            assert [report.terminal for report in cluster.reports] == ["completed"] * 40
            assert all(r.prefill_worker in ("p0", "p1") and r.decode_worker in ("d0", "d1") for r in cluster.reports)
            await cluster.assert_quiet()

    run_virtual(scenario())


async def run_all(
    cluster: VirtualCluster, count: int = 16, prompt_tokens: int = 60, spread_s: float = 0.0
) -> list[Served]:
    tasks = []
    for number in range(count):
        tasks.append(cluster.submit(oracle_request(number, prompt_tokens + number % 7)))
        if spread_s:
            await asyncio.sleep(spread_s)
    return list(await asyncio.gather(*tasks))


def test_mixed_workers_need_no_transfer() -> None:
    async def scenario() -> None:
        async with VirtualCluster(MIXED) as cluster:
            assert all(each.right for each in await run_all(cluster))
            assert all(report.prefill_worker == report.decode_worker for report in cluster.reports)
            assert not any(worker.transfer.outgoing or worker.transfer.incoming for worker in cluster.workers.values())
            await cluster.assert_quiet()

    run_virtual(scenario())


def test_a_request_that_ends_at_its_first_token_reserves_nothing() -> None:
    async def scenario() -> None:
        async with VirtualCluster(SPLIT, settings=ALWAYS_SPLIT) as cluster:
            served = await cluster.serve(oracle_request(1, 50, max_tokens=1))
            assert served.right
            assert served.report is not None
            assert served.report.decode_worker is None
            assert "granted" not in served.report.times
            await cluster.assert_quiet()

    run_virtual(scenario())


def test_a_stop_token_that_comes_first_gives_the_reservation_back() -> None:
    async def scenario() -> None:
        async with VirtualCluster(SPLIT, settings=ALWAYS_SPLIT) as cluster:
            plain = await cluster.serve(oracle_request(1, 50))
            request = oracle_request(1, 50)
            sampling = request.sampling
            stopping = type(sampling)(
                max_tokens=24, temperature=1.0, seed=1, stop_token_ids=(plain.emission.tokens[0],)
            )
            served = await cluster.serve(oracle_request(1, 50, sampling=stopping))
            assert served.right
            assert served.emission.count == 1
            await cluster.assert_quiet()

    run_virtual(scenario())


# --- deaths -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("victim", ["p0", "d0"])
def test_a_death_at_any_moment_loses_nothing(victim: str) -> None:
    """The same load with the kill moved through every phase of it, from before the first grant to after the end."""

    async def scenario(moment_s: float, restart_s: float | None) -> tuple[int, float]:
        async with VirtualCluster(SPLIT, settings=ALWAYS_SPLIT) as cluster:
            begun = cluster.now()
            cluster.later(moment_s, lambda: cluster.kill(victim, restart_s))
            served = await run_all(cluster, 10)
            elapsed = max(each.done_at for each in served) - begun
            assert [each.request.request_id for each in served if not each.right] == []
            assert {report.terminal for report in cluster.reports} == {"completed"}
            await asyncio.sleep(max(0.0, moment_s - elapsed))
            await cluster.assert_quiet()
            return sum(report.migrations + report.moves for report in cluster.reports), elapsed

    outcomes = [run_virtual(scenario(step * 0.017, 0.5 if step % 2 else None)) for step in range(14)]
    assert sum(interrupted > 0 for interrupted, _ in outcomes) >= 4, "the fault hardly ever fired"
    assert max(elapsed for _, elapsed in outcomes) < 2.0


def test_a_death_of_both_partners_at_once() -> None:
    async def scenario() -> None:
        async with VirtualCluster(SPLIT, settings=ALWAYS_SPLIT) as cluster:
            cluster.later(0.06, lambda: (cluster.kill("p0"), cluster.kill("d0")))
            assert all(each.right for each in await run_all(cluster, 24))
            assert sum(report.migrations for report in cluster.reports) > 4
            await cluster.assert_quiet()

    run_virtual(scenario())


def test_all_prefill_workers_dead_leaves_decode_to_prefill() -> None:
    async def scenario() -> None:
        async with VirtualCluster(SPLIT, settings=ALWAYS_SPLIT) as cluster:
            cluster.later(0.05, lambda: (cluster.kill("p0"), cluster.kill("p1")))
            assert all(each.right for each in await run_all(cluster))
            await cluster.assert_quiet()

    run_virtual(scenario())


def test_without_decode_workers_every_request_ends_typed_and_soon() -> None:
    settings = RouterSettings(retry=RetrySettings(no_worker_timeout_s=3.0))

    async def scenario() -> None:
        async with VirtualCluster(SPLIT, settings=settings) as cluster:
            cluster.later(0.1, lambda: (cluster.kill("d0"), cluster.kill("d1")))
            served = await run_all(cluster, 24)
            late = await cluster.serve(oracle_request(99))
            failed = [each for each in (*served, late) if each.error is not None]
            assert len(failed) > 10
            for each in failed:
                assert isinstance(each.error, RefusedError)
                assert each.error.code is FailureCode.NO_WORKER
                assert each.error.retry_after_s
                assert each.a_prefix
            assert all(each.done_at < 0.1 + 3.0 + 1.5 for each in served)
            assert len(cluster.reports) == 25
            assert sum(report.terminal == "no_worker" for report in cluster.reports) == len(failed)
            await cluster.assert_quiet()

    run_virtual(scenario())


def test_a_fleet_that_comes_back_in_time_answers() -> None:
    async def scenario() -> None:
        async with VirtualCluster(SPLIT) as cluster:
            cluster.later(0.08, lambda: [cluster.kill(worker_id, restart_s=5.0) for worker_id in SPLIT])
            assert all(each.right for each in await run_all(cluster))
            await cluster.assert_quiet()

    run_virtual(scenario())


def test_a_frozen_worker_is_given_up() -> None:
    async def scenario() -> None:
        async with VirtualCluster(SPLIT, settings=ALWAYS_SPLIT) as cluster:
            cluster.later(0.05, lambda: cluster.workers["d0"].freeze())
            served = await run_all(cluster)
            assert all(each.right for each in served)
            assert "d0" not in cluster.router.fleet.workers
            assert max(each.done_at for each in served) < 3.0

    run_virtual(scenario())


# --- poison -----------------------------------------------------------------------------------------------------------


def test_a_poisonous_request_fails_alone() -> None:
    """It kills whoever computes it. It may take workers with it until it is alone, but no other request."""

    async def scenario() -> None:
        async with VirtualCluster(SPLIT, settings=ALWAYS_SPLIT) as cluster:
            original = cluster.kill
            cluster.kill = lambda worker_id, restart_s=1.0: original(worker_id, restart_s)  # type: ignore[method-assign]
            poison = oracle_request(666, 30)
            cluster.poison.add(poison.prompt)
            neighbours = [cluster.submit(oracle_request(n, 60)) for n in range(12)]
            killer = await cluster.serve(poison)
            assert isinstance(killer.error, RefusedError)
            assert killer.error.code is FailureCode.POISONED
            assert len(cluster.kills) == 3
            assert all(each.right for each in await asyncio.gather(*neighbours))
            await asyncio.sleep(2.0)
            await cluster.assert_quiet()

    run_virtual(scenario())


@pytest.mark.parametrize("back_s", [0.1, 0.7])
def test_a_network_that_breaks_at_every_start_poisons_nobody(back_s: float) -> None:
    """Whoever computes a request is lost from sight before its fourth token, again and again, and comes back."""

    async def scenario() -> None:
        async with VirtualCluster({"a": Role.MIXED, "b": Role.MIXED}, Shape(step_s=0.05)) as cluster:
            served = cluster.submit(oracle_request(1, 30))
            breaks = 0
            while breaks < 4 and not served.done():
                await asyncio.sleep(0.12)
                for worker_id, worker in cluster.workers.items():
                    if worker.scheduler.stats().running and worker.attached:
                        cluster.break_stream(worker_id, back_s)
                        breaks += 1
            result = await served
            assert result.right, result.error
            assert result.report is not None
            assert result.report.migrations == breaks >= 4, "the fault did not fire"
            assert cluster.kills == []
            await cluster.assert_quiet()

    run_virtual(scenario())


def test_the_innocent_survive_two_nodes_lost_in_a_row() -> None:
    async def scenario() -> None:
        roles = {"p0": Role.PREFILL, "d0": Role.DECODE, "d1": Role.DECODE, "d2": Role.DECODE}
        async with VirtualCluster(roles, settings=ALWAYS_SPLIT) as cluster:
            cluster.later(0.10, lambda: cluster.kill("d0"))
            cluster.later(0.13, lambda: cluster.kill("d1"))
            cluster.later(0.16, lambda: cluster.kill("p0"))
            served = await run_all(cluster, 30)
            assert [each.error for each in served if not each.right] == []
            await cluster.assert_quiet()

    run_virtual(scenario())


# --- refusals, waits, cancellation ------------------------------------------------------------------------------------


def test_a_refusal_leads_to_the_next_worker() -> None:
    async def scenario() -> None:
        async with VirtualCluster(SPLIT, settings=ALWAYS_SPLIT) as cluster:
            cluster.drain("d0")
            cluster.drain("p0")
            served = await run_all(cluster)  # placed before the router hears of it, and refused
            assert all(each.right for each in served)
            assert {(each.prefill_worker, each.decode_worker) for each in cluster.reports} == {("p1", "d1")}
            assert sum(report.moves for report in cluster.reports) > 0
            await cluster.assert_quiet()

    run_virtual(scenario())


def test_a_long_wait_for_a_grant_ends_at_a_worker_with_room() -> None:
    """d0 is full with a request that holds nearly all its blocks; d1 gets free while the next one waits at d0."""
    shape = Shape(num_blocks=44, chunk=32, step_s=0.05)
    roles = {"p0": Role.PREFILL, "d0": Role.DECODE, "d1": Role.DECODE}

    async def scenario() -> None:
        async with VirtualCluster(roles, shape, ALWAYS_SPLIT) as cluster:
            long = cluster.submit(oracle_request(1, 100, max_tokens=60))
            await asyncio.sleep(0.05)
            holder = next(iter(cluster.router._journeys)).route
            assert holder is not None
            other = "d1" if holder.decode == "d0" else "d0"
            breaker = cluster.router.fleet.workers[other].breaker
            breaker._until = 1e9  # the router sees one candidate only
            waiting = cluster.submit(oracle_request(2, 100, max_tokens=8))
            await asyncio.sleep(0.05)
            breaker.succeeded()
            served = await waiting
            assert served.right
            assert served.report is not None
            assert served.report.decode_worker == other
            assert served.report.moves == 1
            assert (await long).right
            await cluster.assert_quiet()

    run_virtual(scenario())


def test_full_workers_are_an_honest_refusal() -> None:
    shape = Shape(max_waiting=1, max_num_seqs=1)
    settings = RouterSettings(admission=AdmissionSettings(admit_ratio=50.0, prefill_backlog_s=1e6))

    async def scenario() -> None:
        async with VirtualCluster(MIXED, shape, settings) as cluster:
            served = await run_all(cluster, 20)
            refused = [each for each in served if each.error is not None]
            assert refused
            assert all(isinstance(e.error, RefusedError) and e.error.code is FailureCode.OVERLOADED for e in refused)
            assert all(each.right for each in served if each.error is None)
            await cluster.assert_quiet()

    run_virtual(scenario())


def test_what_fits_no_worker_is_refused_at_once() -> None:
    async def scenario() -> None:
        async with VirtualCluster(MIXED) as cluster:
            served = await cluster.serve(oracle_request(1, 1900, max_tokens=1000))
            assert isinstance(served.error, RefusedError)
            assert served.error.code is FailureCode.TOO_LARGE
            assert served.done_at < 1.0

    run_virtual(scenario())


def test_a_prefill_worker_that_goes_before_it_is_asked_is_nobodys_failure() -> None:
    """All wait for decode's grants, which a stopped worker does not give; then their prefill worker drains and goes."""

    async def scenario() -> None:
        roles = {"p0": Role.PREFILL, "p1": Role.PREFILL, "d0": Role.DECODE}
        async with VirtualCluster(roles, settings=ALWAYS_SPLIT) as cluster:
            long = cluster.submit(oracle_request(99, 10, max_tokens=400))
            await asyncio.sleep(0.1)
            cluster.workers["d0"].freeze()  # in a step, so it reads nothing
            waiting = [cluster.submit(oracle_request(n, 40)) for n in range(8)]
            await asyncio.sleep(0.1)
            cluster.kill("p0", restart_s=0.3)
            await asyncio.sleep(0.2)
            cluster.workers["d0"]._thaw.set()
            served = [await each for each in waiting]
            assert (await long).right
            assert all(each.right for each in served)
            reports = [each.report for each in served]
            assert sum(report.moves for report in reports if report is not None) > 0, "the fault did not fire"
            assert sum(report.migrations for report in reports if report is not None) == 0
            await cluster.assert_quiet()

    run_virtual(scenario())


def test_the_wait_for_a_turn_is_bounded() -> None:
    async def scenario() -> None:
        settings = RouterSettings(admission=AdmissionSettings(admit_ratio=0.01))
        async with VirtualCluster({"m0": Role.MIXED}, settings=settings) as cluster:
            long = cluster.submit(oracle_request(1, 10, max_tokens=400))
            await asyncio.sleep(0.02)
            short = await cluster.serve(oracle_request(2, 10, queue_timeout_s=0.5))
            assert isinstance(short.error, RefusedError)
            assert short.error.code is FailureCode.DEADLINE
            assert short.done_at < 1.2
            assert (await long).right

    run_virtual(scenario())


def test_a_request_has_an_end_even_if_its_worker_says_nothing() -> None:
    settings = RouterSettings(retry=RetrySettings(request_timeout_s=4.0))

    async def scenario() -> None:
        async with VirtualCluster({"m0": Role.MIXED}, settings=settings) as cluster:
            worker = cluster.workers["m0"]
            worker.deliver = lambda message: None  # type: ignore[method-assign]
            cluster.router.fleet.overdue = lambda now: []  # type: ignore[method-assign]
            served = await cluster.serve(oracle_request(1))
            assert isinstance(served.error, RefusedError)
            assert served.error.code is FailureCode.DEADLINE
            assert served.done_at == pytest.approx(4.0, abs=0.1)

    run_virtual(scenario())


@pytest.mark.parametrize("settings", [ALWAYS_SPLIT, RouterSettings()])
def test_cancelled_at_any_moment_holds_nothing(settings: RouterSettings) -> None:
    async def scenario(moment_s: float) -> None:
        async with VirtualCluster(SPLIT, settings=settings) as cluster:
            others = [cluster.submit(oracle_request(n, 40)) for n in range(4)]
            task = cluster.submit(oracle_request(50, 130))
            await asyncio.sleep(moment_s)
            task.cancel()
            await asyncio.wait({task})
            assert all(each.right for each in await asyncio.gather(*others))
            assert {report.request_id: report.terminal for report in cluster.reports}["r50"] in (
                "cancelled",
                "completed",
            )
            await cluster.assert_quiet()

    for step in range(8):
        run_virtual(scenario(step * 0.023))


# --- choices ----------------------------------------------------------------------------------------------------------


def test_further_choices_find_the_prompt_where_the_first_one_decodes() -> None:
    """Submitted at the first token, as the ingress does: nearly nothing may be computed again."""

    async def scenario() -> None:
        async with VirtualCluster(SPLIT, Shape(transfer_s=0.03)) as cluster:
            prompt = oracle_request(1, 200).prompt
            choices: list[asyncio.Task[Served]] = []

            def first_token() -> None:
                if not choices:
                    choices.extend(cluster.submit(oracle_request(n, prompt=prompt)) for n in (2, 3, 4))

            first = await cluster.submit(oracle_request(1, prompt=prompt), first_token)
            served = [first, *await asyncio.gather(*choices)]
            assert all(each.right for each in served)
            assert first.report is not None
            assert first.report.prefill_worker != first.report.decode_worker
            for each in served[1:]:
                assert each.report is not None
                assert each.report.decode_worker == each.report.prefill_worker == first.report.decode_worker
                assert each.emission.cached_tokens >= 196
            await cluster.assert_quiet()

    run_virtual(scenario())


# --- the shape of the file --------------------------------------------------------------------------------------------


def test_the_numbered_list_is_the_order_of_the_calls() -> None:
    path = Path(__file__).parents[2] / "router" / "request_path.py"
    tree = ast.parse(path.read_text())
    listed = re.findall(r"^    \d\. (\w+)", ast.get_docstring(tree) or "", re.MULTILINE)
    serve = next(n for n in tree.body if isinstance(n, ast.AsyncFunctionDef) and n.name == "serve_request")
    steps = {n.name for n in tree.body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)}
    calls = [
        n for n in ast.walk(serve) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.func.id in steps
    ]
    called = [n.func.id for n in sorted(calls, key=lambda n: n.lineno) if isinstance(n.func, ast.Name)]
    assert listed == called
    assert len(listed) == 8
    assert (serve.end_lineno or 0) - serve.lineno + 1 <= 60


def test_it_imports_neither_torch_nor_ray_nor_asyncio() -> None:
    code = (
        "import sys; import penstock.router.request_path; "
        "print([m for m in ('torch', 'ray', 'fastapi', 'starlette', 'grpc') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
    banned = {"asyncio", "time", "random", "torch", "ray", "threading", "fastapi"}
    for path in (Path(__file__).parents[2] / "router").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            assert not banned & {name.split(".")[0] for name in names}, path
            waits = isinstance(node, ast.Await | ast.AsyncFunctionDef) and path.name not in (
                "request_path.py",
                "port.py",
            )
            assert not waits, f"{path} awaits"


@pytest.mark.parametrize(("victim", "settings"), [("p0", ALWAYS_SPLIT), ("d0", RouterSettings())])
def test_scores_of_a_prompt_survive_a_death_at_any_moment(victim: str, settings: RouterSettings) -> None:
    """Every prompt token has its own score when the first token is out, whoever computed which part of it."""

    async def scenario(moment_s: float) -> int:
        async with VirtualCluster(SPLIT, Shape(chunk=16), settings) as cluster:
            requests = []
            for number in range(6):
                request = oracle_request(number, 60 + number, max_tokens=1 if number % 4 == 3 else 20)
                sampling = dataclasses.replace(request.sampling, prompt_logprobs=number % 2 + 1)
                requests.append(dataclasses.replace(request, sampling=sampling, embed=number % 4 == 3))
            cluster.later(moment_s, lambda: cluster.kill(victim, 0.5))
            served = await asyncio.gather(*(cluster.submit(request) for request in requests))
            for each in served:
                assert each.right
                first, *scores = each.emission.prompt_logprobs
                assert first is None
                assert [score.top[0][0] for score in scores if score] == list(each.request.prompt[1:])
                assert {len(score.top) for score in scores if score} == {each.request.sampling.prompt_logprobs}
                if each.request.embed:
                    assert each.emission.embedding is not None
                    assert each.emission.embedding.tolist() == expected_embedding(each.request.prompt).tolist()
            await cluster.assert_quiet()
            return sum(report.migrations for report in cluster.reports)

    migrations = [run_virtual(scenario(0.011 + step * 0.023)) for step in range(5)]
    assert sum(count > 0 for count in migrations) >= 2, "the fault hardly ever fired"
