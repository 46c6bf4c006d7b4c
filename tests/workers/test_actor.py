"""The worker actor's class without Ray: starting, its lease, and what it does when its engine fails."""

import asyncio
import threading
from typing import NoReturn

import pytest
from fakes.worker_process import CLUSTER_KEY, oracle_settings

from penstock.workers.actor import WorkerActor
from penstock.workers.process import EXIT_ENGINE_FAILED, EXIT_ORPHANED
from penstock.workers.rpc import WorkerClient
from penstock.workers.settings import KVSettings


class Exit:
    """Stands in for os._exit: the thread that leaves goes no further."""

    def __init__(self) -> None:
        self.code: int | None = None
        self.left = threading.Event()

    def __call__(self, code: int) -> NoReturn:
        self.code = code
        self.left.set()
        threading.Event().wait()
        raise AssertionError


async def started(actor: WorkerActor) -> dict[str, object]:
    facts = await actor.start()
    assert facts == await actor.describe()
    return facts


def test_it_serves_while_its_lease_is_renewed_and_leaves_after() -> None:
    async def scenario() -> None:
        leave = Exit()
        actor = WorkerActor(oracle_settings("w").to_json(), 4.0, leave)
        assert await actor.describe() == {}
        facts = await started(actor)
        assert facts["incarnation"] == 1
        client = WorkerClient(str(facts["address"]), CLUSTER_KEY)
        for _ in range(18):
            await asyncio.sleep(0.25)
            await actor.renew()
        assert (await client.status())["worker_id"] == "w"
        assert not leave.left.is_set()
        assert await asyncio.to_thread(leave.left.wait, 20.0)
        assert leave.code == EXIT_ORPHANED
        await client.close()
        await actor.stop(0.0)

    asyncio.run(scenario())


def test_it_says_why_it_cannot_start() -> None:
    async def scenario() -> None:
        settings = oracle_settings("w", kv=KVSettings(num_blocks=2))
        facts = await WorkerActor(settings.to_json(), 60.0, Exit()).start()
        assert "address" not in facts
        assert facts["error"] == "ConfigError"
        assert "the KV pool holds 2 blocks" in str(facts["message"])

    asyncio.run(scenario())


def test_a_failed_engine_ends_the_process_and_an_orderly_stop_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        leave = Exit()
        actor = WorkerActor(oracle_settings("w").to_json(), 60.0, leave)
        await started(actor)
        await actor.stop(0.5)
        await asyncio.sleep(0.5)
        assert not leave.left.is_set()

        def fail(*_: object) -> None:
            raise RuntimeError("the device is gone")

        monkeypatch.setattr("penstock.workers.engine.Engine.run", fail)
        failing = Exit()
        await WorkerActor(oracle_settings("w").to_json(), 60.0, failing).start()
        assert await asyncio.to_thread(failing.left.wait, 3.0)
        assert failing.code == EXIT_ENGINE_FAILED

    asyncio.run(scenario())
