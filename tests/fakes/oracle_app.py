"""The whole front over real oracle workers, in this process: HTTP application, router, one prefill, one decode worker.

An ASGI application for `HttpServer`: workers start and stop with its lifespan. Text is the tiny model's; tokens are the
oracle's, so every answer can be checked against `expected_tokens`, and one wrong KV block changes it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import MutableMapping
from dataclasses import replace
from typing import Any

from fakes.tiny_model import CONTEXT

from penstock.cluster.client import connect
from penstock.cluster.fleet_view import LinkedFleet
from penstock.cluster.generation import Generator, open_generator
from penstock.cluster.ingress.app import Ingress, build_app
from penstock.cluster.ingress.settings import IngressSettings
from penstock.cluster.metrics import Metrics
from penstock.cluster.roster import Roster, RosterEntry, WorkerState
from penstock.cluster.text import TextCodec
from penstock.router.settings import RouterSettings
from penstock.workers.assembly import Worker, build_worker
from penstock.workers.oracle import expected_tokens
from penstock.workers.protocol import Role, SamplingParams
from penstock.workers.settings import KVSettings, RunnerSettings, SchedulerSettings, WorkerSettings

VOCAB = 400
CLUSTER_KEY = "cd" * 32
BLOCK = 16
CANARY_PROMPT = tuple(range(40, 80))
CANARY_TOKENS = 12


def oracle_settings(role: Role) -> WorkerSettings:
    return WorkerSettings(
        worker_id=f"{role.value}-0",
        role=role,
        cluster_key=CLUSTER_KEY,
        scheduler=SchedulerSettings(max_num_seqs=64, max_num_batched_tokens=256, max_model_len=CONTEXT),
        kv=KVSettings(block_size=BLOCK, num_blocks=2048),
        runner=RunnerSettings(kind="oracle", oracle_vocab=VOCAB),
    )


class OracleApp:
    """ASGI. `app` is the application while the server runs."""

    def __init__(self, codec: TextCodec, **settings: Any) -> None:
        self._codec = codec
        self._settings = replace(IngressSettings(("tiny",), CONTEXT, block_size=BLOCK), **settings)
        self._workers: list[Worker] = []
        self._generator: Generator
        self.app: Ingress

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "lifespan":
            await self.app(scope, receive, send)
            return
        while True:
            message = await receive()
            if message["type"] == "lifespan.startup":
                await self._start()
            else:
                await self._stop()
            await send({"type": f"{message['type']}.complete"})
            if message["type"] == "lifespan.shutdown":
                return

    @property
    def idle(self) -> bool:
        """Nothing runs, waits, or holds a block."""
        if self._generator.open_generations:
            return False
        loads = [worker._engine.load() for worker in self._workers]
        return all(load.running + load.waiting + load.transfers + load.quarantined_blocks == 0 for load in loads)

    def worker_settings(self) -> list[WorkerSettings]:
        return [oracle_settings(role) for role in (Role.PREFILL, Role.DECODE)]

    async def _start(self) -> None:
        entries = []
        for settings in self.worker_settings():
            worker = build_worker(settings)
            self._workers.append(worker)
            entries.append(RosterEntry(settings.worker_id, settings.role, 1, 1, WorkerState.READY, worker.start()))
        self._generator = open_generator(RouterSettings(), CLUSTER_KEY)
        self._generator.links.update(Roster(1, tuple(entries)))
        if not await self._generator.links.wait_attached(20.0):
            raise AssertionError("the workers do not answer")
        fleet = LinkedFleet(self._generator.links)
        self.app = build_app(self._settings, self._codec, self._generator, Metrics(), fleet)

    async def _stop(self) -> None:
        await self._generator.close()
        for worker in self._workers:
            worker.stop()


class Canary(threading.Thread):
    """Streams one prompt over and over; `rounds` counts the perfect ones, `faults` says what was not."""

    def __init__(self, url: str, key: str) -> None:
        super().__init__(daemon=True)
        self.rounds = 0
        self.faults: list[str] = []
        self.leave = threading.Event()
        self._handle = connect(url, key)

    def run(self) -> None:
        wanted = expected_tokens(CANARY_PROMPT, SamplingParams(max_tokens=CANARY_TOKENS), VOCAB)
        options: Any = {"max_tokens": CANARY_TOKENS, "ignore_eos": True, "temperature": 0}
        while not self.leave.is_set():
            try:
                chunks = self._handle.stream(CANARY_PROMPT, **options)
                tokens = tuple(token for chunk in chunks for token in chunk.token_ids)
            except Exception as error:  # noqa: BLE001 - whatever happens to the canary is a finding
                self.faults.append(repr(error))
                continue
            if tokens != wanted:
                self.faults.append(f"wrong tokens {tokens}")
            self.rounds += 1
        self._handle.close()

    def check(self) -> None:
        """Assert that nothing has disturbed it so far."""
        assert not self.faults, self.faults[:3]

    def sang(self) -> None:
        """Assert that it is well and comes through another whole round."""
        goal, deadline = self.rounds + 1, time.monotonic() + 20
        while self.rounds < goal and not self.faults and time.monotonic() < deadline:
            time.sleep(0.002)
        self.check()
        assert self.rounds >= goal

    def end(self) -> None:
        """Stop it; it must have been well to the last."""
        self.leave.set()
        self.join(20)
        self.check()
