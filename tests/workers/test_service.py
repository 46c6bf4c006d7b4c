"""The service between real streams and an engine that only takes notes: greeting, fencing, reporting, slow readers."""

import asyncio
import dataclasses
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from fakes.worker_process import CLUSTER_KEY, Attachment

from penstock.workers import service as service_module
from penstock.workers.errors import ConfigError, RefusedError
from penstock.workers.inbox import Attached, Detached
from penstock.workers.outbox import Outbox
from penstock.workers.protocol import (
    WIRE_VERSION,
    Cancel,
    Failed,
    FailureCode,
    Generate,
    GenerateRequest,
    Hello,
    KVSnapshot,
    Load,
    Role,
    SamplingParams,
    Started,
    Welcome,
)
from penstock.workers.rpc import AttachedStream, WorkerClient
from penstock.workers.service import WorkerService

WELCOME = Welcome(WIRE_VERSION, "w", 1, Role.MIXED, 1, 1, 16, 8, 4, 128, 64, "127.0.0.1:1", "host", "same")


class Notes:
    """Takes the place of the engine."""

    def __init__(self) -> None:
        self.posted: list[tuple[str, Any]] = []
        self.full = False
        self.changed = threading.Event()

    def post(self, router_id: str, message: Any) -> bool:
        self.posted.append((router_id, message))
        return not self.full

    def load(self) -> Load:
        return Load(7, 0.0, 0.1, 1, 2, 3, 4, 5, 6, 7, 8, False)

    def names(self) -> list[str]:
        return [name for name, message in self.posted if isinstance(message, Attached)]

    async def until(self, ready: Any) -> None:
        give_up = time.monotonic() + 20
        while not ready():
            assert time.monotonic() < give_up, self.posted
            await asyncio.sleep(0.005)


async def drained(stream: AttachedStream) -> None:
    """Read to the end."""
    while await stream.read() is not None:
        pass


@pytest.fixture
def engine() -> Notes:
    return Notes()


@pytest.fixture
def service(engine: Notes) -> Iterator[WorkerService]:
    service = WorkerService(WELCOME, 0.05, CLUSTER_KEY)
    yield service
    service.stop()


def start(service: WorkerService, engine: Any) -> str:
    return service.start(engine, "127.0.0.1", 0)


async def test_messages_go_to_the_engine_and_come_back(service: WorkerService, engine: Notes) -> None:
    router = await Attachment.open(start(service, engine), "r", 3, 12.0)
    assert router.stream.welcome == WELCOME
    router.send(Cancel(1, 2))
    await engine.until(lambda: len(engine.posted) == 2)
    (name, attached), (same_name, cancel) = engine.posted
    assert (attached, cancel, name) == (Attached(12.0), Cancel(1, 2), same_name)
    service.send(name, Started(1, 2, 3))
    service.send("nobody", Started(1, 2, 4))
    await router.until(lambda: Started(1, 2, 3) in router.others)
    await router.until(lambda: any(isinstance(message, Load) for message in router.others))
    await router.close()
    await engine.until(lambda: engine.posted[-1] == (name, Detached()))
    service.send(name, Started(9, 9, 9))  # ignored


async def test_every_stream_gets_its_own_name_and_the_older_one_ends(service: WorkerService, engine: Notes) -> None:
    address = start(service, engine)
    first = await Attachment.open(address, "r", 3)
    second = await Attachment.open(address, "r", 3)
    await first.until(lambda: first.lost is not None)
    one, two = engine.names()
    assert one != two
    kinds = [(name, type(message)) for name, message in engine.posted]
    assert kinds == [(one, Attached), (one, Detached), (two, Attached)]
    with pytest.raises(RefusedError, match="epoch 3"):
        await Attachment.open(address, "r", 2)
    other = await Attachment.open(address, "other", 1)
    assert second.lost is None
    for attachment in (first, second, other):
        await attachment.close()


@pytest.mark.parametrize(
    ("hello", "says", "code"),
    [
        (Hello(WIRE_VERSION + 1, "r", 1, 5.0), f"wire version {WIRE_VERSION + 1}", FailureCode.INCOMPATIBLE),
        (Hello(WIRE_VERSION, "r", 1, 0.0), "lease_s", FailureCode.INCOMPATIBLE),
        (Hello(WIRE_VERSION, "r", 1, 1e8), "lease_s", FailureCode.INCOMPATIBLE),
    ],
)
async def test_a_wrong_hello_is_refused(
    service: WorkerService, engine: Notes, hello: Hello, says: str, code: FailureCode
) -> None:
    client = WorkerClient(start(service, engine), CLUSTER_KEY)
    with pytest.raises(RefusedError, match=says) as refusal:
        await client.attach(hello)
    assert refusal.value.code is code
    assert engine.posted == []
    await client.close()


async def test_a_stream_must_begin_with_hello(
    service: WorkerService, engine: Notes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service_module, "_HELLO_WITHIN_S", 0.1)
    client = WorkerClient(start(service, engine), CLUSTER_KEY)
    with pytest.raises(RefusedError, match="Cancel instead of Hello"):
        await client.attach(Cancel(1, 1))  # type: ignore[arg-type]
    await client.close()


async def test_a_full_engine_refuses_requests_typed(service: WorkerService, engine: Notes) -> None:
    router = await Attachment.open(start(service, engine))
    engine.full = True
    router.send(Generate(4, 1, GenerateRequest("q", (1, 2), SamplingParams(3))))
    await router.until(lambda: (4, 1) in router.failed)
    assert isinstance(router.failed[4, 1], Failed)
    assert router.failed[4, 1].code is FailureCode.QUEUE_FULL
    await router.close()


async def test_cut_ends_a_stream(service: WorkerService, engine: Notes) -> None:
    router = await Attachment.open(start(service, engine))
    service.cut("nobody")
    service.cut(engine.names()[0])
    await router.until(lambda: router.lost is not None)
    await router.close()


async def test_a_reader_that_stops_is_cut_off_and_its_neighbour_is_not(
    service: WorkerService, engine: Notes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service_module, "Outbox", lambda notify, version: Outbox(notify, 2 << 20, version))
    address = start(service, engine)
    neighbour = await Attachment.open(address, "neighbour")
    client = WorkerClient(address, CLUSTER_KEY)
    stopped = await client.attach(Hello(WIRE_VERSION, "stopped", 1, 30.0))
    name = next(name for name in engine.names() if name.startswith("stopped"))
    for number in range(200):
        service.send(name, KVSnapshot(number, bytes(1 << 20)))
        await asyncio.sleep(0.002)
        if (name, Detached()) in engine.posted:
            break
    await engine.until(lambda: (name, Detached()) in engine.posted)
    with pytest.raises(RefusedError, match="reads too slowly") as cut:
        await drained(stopped)
    assert cut.value.code is FailureCode.WORKER_LOST
    service.send(engine.names()[0], Started(1, 1, 1))
    await neighbour.until(lambda: Started(1, 1, 1) in neighbour.others)
    await stopped.close()
    await client.close()
    await neighbour.close()


async def test_status_tells_who_and_how_loaded(service: WorkerService, engine: Notes) -> None:
    client = WorkerClient(start(service, engine), CLUSTER_KEY)
    status = await client.status()
    assert status["worker_id"] == "w"
    assert status["state"] == "ready"
    assert {**status["load"], "totals": dataclasses.asdict(engine.load().totals)} == dataclasses.asdict(engine.load())
    await client.close()


def test_a_taken_port_stops_the_start_and_leaves_no_thread(service: WorkerService, engine: Notes) -> None:
    before = set(threading.enumerate())
    address = start(service, engine)
    second = WorkerService(WELCOME, 0.05)
    with pytest.raises(ConfigError, match="cannot listen"):
        second.start(engine, "127.0.0.1", int(address.rsplit(":", 1)[1]))  # type: ignore[arg-type]
    second.stop()
    service.stop()
    left = set(threading.enumerate()) - before
    assert [thread.name for thread in left if thread.name in ("rpc", "heartbeat")] == []
