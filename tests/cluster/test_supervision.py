"""The supervisor over a fake host, on a virtual clock."""

import asyncio

import pytest
from fakes.fake_host import FakeHost
from fakes.virtual_clock import run_virtual

from penstock.cluster.roster import WorkerState
from penstock.cluster.supervision import Backoff, StartError, Supervisor
from penstock.workers.settings import WorkerSettings


def settings(*worker_ids: str) -> list[WorkerSettings]:
    return [WorkerSettings(worker_id) for worker_id in worker_ids]


def test_all_start_at_once_and_all_end() -> None:
    async def scenario() -> None:
        host = FakeHost()
        supervisor = Supervisor(host, settings("a", "b", "c"))
        began = asyncio.get_running_loop().time()
        roster = await supervisor.start()
        assert asyncio.get_running_loop().time() - began == pytest.approx(1.0)
        assert [(e.worker_id, e.state, e.incarnation) for e in roster.entries] == [
            (worker_id, WorkerState.READY, 1) for worker_id in "abc"
        ]
        await supervisor.stop(3.0)
        assert host.alive() == []
        assert {worker.drained_s for worker in host.workers} == {3.0}
        assert {entry.state for entry in supervisor.roster.entries} == {WorkerState.STOPPED}
        await asyncio.sleep(100)
        assert len(host.started) == 3, "something was started after stop"

    run_virtual(scenario())


def test_a_dead_worker_comes_back_with_a_higher_incarnation() -> None:
    async def scenario() -> None:
        host = FakeHost()
        versions: list[int] = []
        supervisor = Supervisor(host, settings("a", "b"), on_change=lambda roster: versions.append(roster.version))
        before = await supervisor.start()
        host.workers[0].gone.set()
        roster = await supervisor.watch(before.version, 10.0)
        entry = roster.entry("a")
        assert entry is not None
        assert (entry.state, entry.address, entry.pids, entry.reason) == (WorkerState.RESTARTING, "", (), "crashed")
        await asyncio.sleep(5)
        entry = supervisor.roster.entry("a")
        assert entry is not None
        assert (entry.state, entry.incarnation, entry.restarts, entry.pids) == (WorkerState.READY, 2, 1, (2,))
        assert supervisor.roster.entry("b") == roster.entry("b")
        assert versions == sorted(set(versions))
        await supervisor.stop(0.0)

    run_virtual(scenario())


def test_a_crash_loop_backs_off_and_a_long_life_wipes_it_clean() -> None:
    async def scenario() -> None:
        host = FakeHost(start_s=0.0)
        backoff = Backoff(first_s=1.0, factor=2.0, longest_s=4.0, healthy_after_s=60.0)
        supervisor = Supervisor(host, settings("a"), backoff=backoff)
        await supervisor.start()
        for _ in range(5):
            host.workers[-1].gone.set()
            await asyncio.sleep(5)
        times = [time for time, _, _ in host.started]
        died = [0.0, 5.0, 10.0, 15.0, 20.0]
        assert [start - death for start, death in zip(times[1:], died, strict=True)] == pytest.approx([1, 2, 4, 4, 4])
        await asyncio.sleep(61)
        host.workers[-1].gone.set()
        death = asyncio.get_running_loop().time()
        await asyncio.sleep(5)
        assert host.started[-1][0] - death == pytest.approx(1.0)
        assert [incarnation for _, _, incarnation in host.started] == [1, 2, 3, 4, 5, 6, 7]
        await supervisor.stop(0.0)

    run_virtual(scenario())


def test_one_that_cannot_start_stops_the_others() -> None:
    async def scenario() -> None:
        host = FakeHost(failing={"b"})
        supervisor = Supervisor(host, settings("a", "b"))
        with pytest.raises(StartError, match="b: no such model"):
            await supervisor.start()
        assert host.alive() == []

    run_virtual(scenario())


def test_without_strictness_it_is_tried_again() -> None:
    async def scenario() -> None:
        host = FakeHost(failing={"b"})
        supervisor = Supervisor(host, settings("a", "b"))
        roster = await supervisor.start(strict=False)
        entry = roster.entry("b")
        assert entry is not None
        assert "no such model" in entry.reason
        await asyncio.sleep(10)
        entry = supervisor.roster.entry("b")
        assert entry is not None
        assert (entry.state, "no such model" in entry.reason) == (WorkerState.RESTARTING, True)
        host.failing.clear()
        await asyncio.sleep(40)
        entry = supervisor.roster.entry("b")
        assert entry is not None
        assert entry.state is WorkerState.READY
        assert len({incarnation for _, worker, incarnation in host.started if worker == "b"}) == len(
            [1 for _, worker, _ in host.started if worker == "b"]
        ), "an incarnation was used twice"
        await supervisor.stop(0.0)

    run_virtual(scenario())


def test_restarts_can_be_turned_off() -> None:
    async def scenario() -> None:
        host = FakeHost()
        supervisor = Supervisor(host, settings("a"), restart=False)
        await supervisor.start()
        host.workers[0].gone.set()
        await asyncio.sleep(60)
        assert len(host.started) == 1
        entry = supervisor.roster.entry("a")
        assert entry is not None
        assert entry.state is WorkerState.STOPPED

    run_virtual(scenario())


def test_stop_while_a_restart_is_under_way_leaves_nobody() -> None:
    async def scenario() -> None:
        host = FakeHost(start_s=2.0)
        supervisor = Supervisor(host, settings("a"))
        await supervisor.start()
        host.workers[0].gone.set()
        await asyncio.sleep(1.0)
        assert len(host.started) == 2
        await supervisor.stop(0.0)
        await asyncio.sleep(60)
        assert host.alive() == []

    run_virtual(scenario())


def test_watch_returns_after_its_time_without_news() -> None:
    async def scenario() -> None:
        supervisor = Supervisor(FakeHost(), settings("a"), first_version=1000)
        roster = await supervisor.start()
        assert roster.version > 1000
        began = asyncio.get_running_loop().time()
        assert (await supervisor.watch(roster.version, 7.0)).version == roster.version
        assert asyncio.get_running_loop().time() - began == pytest.approx(7.0)
        assert (await supervisor.watch(roster.version - 1, 7.0)).version == roster.version
        assert asyncio.get_running_loop().time() - began == pytest.approx(7.0)
        await supervisor.stop(0.0)

    run_virtual(scenario())


def test_workers_join_and_leave_while_it_runs() -> None:
    async def scenario() -> None:
        host = FakeHost()
        supervisor = Supervisor(host, ())
        supervisor.add(settings("a")[0], "one")
        supervisor.add(settings("a")[0], "one")
        await asyncio.sleep(2)
        entry = supervisor.roster.entry("a")
        assert entry is not None
        assert (entry.state, entry.edition, len(host.started)) == (WorkerState.READY, "one", 1)
        assert supervisor.roster.of_edition("two").entries == ()
        seen: list[WorkerState | None] = []

        async def watch() -> None:
            while True:
                seen.append(entry.state if (entry := supervisor.roster.entry("a")) else None)
                await supervisor.watch(supervisor.roster.version, 5.0)

        watcher = asyncio.ensure_future(watch())
        await asyncio.sleep(0)
        await supervisor.remove("a", 7.0)
        await asyncio.sleep(0)
        watcher.cancel()
        assert seen[:2] == [WorkerState.READY, WorkerState.STOPPING], "routers must hear of it before it ends"
        assert host.workers[0].drained_s == 7.0
        assert supervisor.roster.entries == ()
        await asyncio.sleep(100)
        assert len(host.started) == 1, "it was started again"
        await supervisor.remove("a", 7.0)
        await supervisor.stop(0.0)

    run_virtual(scenario())


def test_one_that_leaves_while_it_starts_or_waits_for_its_restart_is_gone() -> None:
    async def scenario() -> None:
        host = FakeHost(start_s=5.0)
        supervisor = Supervisor(host, ())
        supervisor.add(settings("a")[0])
        await asyncio.sleep(1)
        await supervisor.remove("a", 1.0)
        host.failing.add("b")
        supervisor.add(settings("b")[0])
        await asyncio.sleep(5.1)
        await supervisor.remove("b", 1.0)
        await asyncio.sleep(100)
        assert host.alive() == []
        assert supervisor.roster.entries == ()
        assert [worker for _, worker, _ in host.started] == ["a", "b"]
        await supervisor.stop(0.0)

    run_virtual(scenario())


def test_a_note_says_what_a_worker_waits_for_until_it_is_there() -> None:
    async def scenario() -> None:
        supervisor = Supervisor(FakeHost(start_s=5.0), ())
        supervisor.add(settings("a")[0])
        supervisor.note("a", "waiting for 1 GPU")
        supervisor.note("stranger", "waiting")
        assert [entry.reason for entry in supervisor.roster.entries] == ["waiting for 1 GPU"]
        await asyncio.sleep(6)
        supervisor.note("a", "late")
        assert [entry.reason for entry in supervisor.roster.entries] == [""]
        await supervisor.stop(0.0)

    run_virtual(scenario())


def test_a_new_worker_is_told_running_peers_of_its_edition_first_and_in_turns() -> None:
    async def scenario() -> None:
        host = FakeHost()
        supervisor = Supervisor(host, ())
        supervisor.add(settings("a")[0], "one")
        supervisor.add(settings("b")[0], "one")
        supervisor.add(settings("x")[0], "two")
        await asyncio.sleep(2)
        assert [worker.settings.weight_peers for worker in host.workers] == [(), (), ()], "nobody ran before"
        for number in range(4):
            supervisor.add(settings(f"c{number}")[0], "one")
        await asyncio.sleep(2)
        told = [worker.settings.weight_peers for worker in host.workers[3:]]
        assert {peers[-1] for peers in told} == {"x:weights"}, "another edition may have the same checkpoint"
        assert {peers[:2] for peers in told} == {("a:weights", "b:weights"), ("b:weights", "a:weights")}
        host.workers[0].gone.set()
        await asyncio.sleep(5)
        again = host.workers[-1].settings
        assert (again.worker_id, again.incarnation) == ("a", 2)
        assert "b:weights" in again.weight_peers
        assert "a:weights" not in again.weight_peers, "itself, as it was"
        await supervisor.stop(0.0)

    run_virtual(scenario())
