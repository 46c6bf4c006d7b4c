"""Links following rosters, and the asyncio port they give to request paths."""

import asyncio
import dataclasses

import pytest
from fakes.scripted_worker import KEY, ScriptedWorker, until
from fakes.virtual_clock import run_virtual

from penstock.cluster import links as links_module
from penstock.cluster.fleet_view import LinkedFleet
from penstock.cluster.links import AsyncSignal, Links
from penstock.cluster.roster import Roster, WorkerState
from penstock.cluster.worker_link import LinkIdentity
from penstock.router.router import Router
from penstock.router.settings import HealthSettings, RouterSettings
from penstock.workers.protocol import Load, Role

LOAD = Load(7, 0.0, 0.01, 3, 2, 0, 900, 10, 1, 4, 5, False)


def new_links(health: HealthSettings | None = None) -> Links:
    router = Router(RouterSettings(health=health or HealthSettings()))
    return Links(router, LinkIdentity("router", 1, KEY, 1.0))


def test_workers_are_linked_replaced_and_let_go() -> None:
    async def scenario() -> None:
        links = new_links()
        async with ScriptedWorker("a") as a, ScriptedWorker("b") as b, ScriptedWorker("a", incarnation=2) as again:
            links.update(Roster(1, (a.entry(), b.entry(state=WorkerState.STARTING, address=""))))
            assert await links.wait_attached(5.0)
            assert links.post_to("a") is not None
            assert links.post_to("b") is None
            links.update(Roster(2, (a.entry(), b.entry())))
            assert await links.wait_attached(5.0)
            links.update(Roster(1, ()))  # stale
            assert links.post_to("b") is not None
            moved = again.entry(incarnation=2)
            links.update(Roster(3, (moved, b.entry(state=WorkerState.RESTARTING, address=""))))
            assert links.post_to("b") is None
            await until(lambda: links.post_to("a") is not None)
            assert again.hellos
            assert not a.heard.qsize()
            views = {view.entry.worker_id: view for view in links.views()}
            assert views["a"].attached
            assert not views["b"].attached
            await links.close()
            assert links.post_to("a") is None

    asyncio.run(scenario())


def test_attaching_takes_its_time_only_as_long_as_allowed() -> None:
    async def scenario() -> None:
        links = new_links()
        async with ScriptedWorker("a") as a:
            gone = dataclasses.replace(a.entry(), worker_id="nobody", address="127.0.0.1:1")
            links.update(Roster(1, (a.entry(), gone)))
            assert not await links.wait_attached(0.3)
            await links.close()

    asyncio.run(scenario())


def test_a_silent_worker_is_cut_off(monkeypatch) -> None:
    async def scenario() -> None:
        monkeypatch.setattr(links_module, "WATCH_INTERVAL_S", 0.05)
        links = new_links(HealthSettings(heartbeat_timeout_s=0.3))
        async with ScriptedWorker("a") as a:
            links.update(a.roster())
            assert await links.wait_attached(5.0)
            for _ in range(6):
                await a.say(LOAD)
                await asyncio.sleep(0.1)
            assert len(a.hellos) == 1
            await until(lambda: len(a.hellos) >= 2, 2.0)
            await links.close()

    asyncio.run(scenario())


def test_the_fleet_view_says_what_the_links_know() -> None:
    async def scenario() -> None:
        links = new_links()
        fleet = LinkedFleet(links)
        assert fleet.unready() == "no worker is known yet"
        async with ScriptedWorker("p", Role.PREFILL) as p, ScriptedWorker("d", Role.DECODE) as d:
            links.update(Roster(1, (p.entry(),)))
            assert await links.wait_attached(5.0)
            assert fleet.unready() == "no decode worker is up"
            links.update(Roster(2, (p.entry(), d.entry(restarts=3, reason="crashed", pids=(42,)))))
            assert await links.wait_attached(5.0)
            assert fleet.unready() == ""
            await d.say(LOAD)
            await until(lambda: fleet.workers()[1].running == 3)
            status = fleet.workers()[1]
            assert (status.id, status.role, status.state, status.pids) == ("d", Role.DECODE, "ready", (42,))
            assert (status.restarts, status.reason, status.waiting, status.transfers) == (3, "crashed", 2, 4)
            assert (status.kv_blocks, status.kv_free_blocks, status.kv_quarantined_blocks) == (1000, 900, 1)
            assert status.age_s is not None
            assert 0 <= status.age_s < 2
            await d.say(dataclasses.replace(LOAD, draining=True))
            await until(lambda: fleet.workers()[1].state == "draining")
            assert fleet.unready() == "no decode worker is up"
            await links.close()

    asyncio.run(scenario())


def test_a_signal_is_remembered_once_and_times_out() -> None:
    async def scenario() -> None:
        signal = AsyncSignal()
        signal.set()
        signal.set()
        assert await signal.wait(1.0)
        assert not await signal.wait(1.0)
        loop = asyncio.get_running_loop()
        loop.call_later(2.0, signal.set)
        began = loop.time()
        assert await signal.wait(5.0)
        assert loop.time() - began == 2.0

    run_virtual(scenario())


def test_a_refused_worker_is_shown_with_the_reason_and_told_once(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        links = new_links()
        wide, odd = ScriptedWorker("p", Role.PREFILL, width=2), ScriptedWorker("d", Role.DECODE, width=3)
        async with wide, odd:
            links.update(Roster(1, (wide.entry(width=2),)))
            assert await links.wait_attached(5.0)
            links.update(Roster(2, (wide.entry(width=2), odd.entry(width=3))))
            assert await links.wait_attached(5.0)
            (_, shown) = LinkedFleet(links).workers()
            assert (shown.state, shown.width) == ("refused", 3)
            assert "neither divides the other" in shown.reason
            assert "no decode worker is up; d is refused: no KV can be exchanged" in LinkedFleet(links).unready()
            odd.cut()
            await until(lambda: len(odd.hellos) == 2)
            assert await links.wait_attached(5.0)
            await links.close()

    asyncio.run(scenario())
    assert [record.message for record in caplog.records if "is refused" in record.message] == [
        "worker d is refused: no KV can be exchanged with p: tensor-parallel widths 3 and 2: neither divides the other"
    ]
