"""Puts one worker together out of its settings and runs it: storage, scheduler, runner, transfer, engine, service.

Used by `process.py` (plain subprocess) and `actor.py` (Ray actor); the one place that knows every part of a worker.
torch is imported only when the settings ask for a model.
"""

from __future__ import annotations

import gc
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from penstock.workers.engine import Engine, EngineParts
from penstock.workers.errors import ConfigError
from penstock.workers.handover import GranterIdentity, HandOver
from penstock.workers.inbox import Drain
from penstock.workers.kv.block_pool import BlockPool
from penstock.workers.kv.layout import KVLayout
from penstock.workers.kv.prefix_cache import PrefixCache
from penstock.workers.kv.storage import KVStorage
from penstock.workers.kv_feed import KVEventFeed
from penstock.workers.observation import Observation
from penstock.workers.oracle import OracleRunner, oracle_layout
from penstock.workers.protocol import WIRE_VERSION, Welcome
from penstock.workers.scheduler.plan import Runner
from penstock.workers.scheduler.scheduler import Scheduler
from penstock.workers.service import WorkerService
from penstock.workers.settings import WorkerSettings
from penstock.workers.spans import SpanSink, open_sink
from penstock.workers.tracing import WorkerTracer
from penstock.workers.transfer.engine import TransferEngine
from penstock.workers.transfer.faults import TransferFaults
from penstock.workers.transfer.host import host_id
from penstock.workers.transfer.port import BlockStorage

log = logging.getLogger(__name__)

_SESSION_ID_BYTES = 16
_POLL_S = 0.02
_LAST_STEP_S = 5.0  # a step that hangs does not keep the process alive longer than this


@dataclass(frozen=True, slots=True)
class WorkerFacts:
    """What a worker says about itself to whoever started it, beside its address."""

    worker_id: str
    transfer_address: str
    pid: int
    num_blocks: int
    block_size: int
    kv_bytes: int
    load_s: float  # building the worker, weights included


class Worker:
    """A worker that is built; `start` serves, `stop` drains and ends, `join` waits for the end."""

    def __init__(
        self,
        settings: WorkerSettings,
        facts: WorkerFacts,
        engine: Engine,
        service: WorkerService,
        transfer: TransferEngine,
        spans: SpanSink | None = None,
    ) -> None:
        self.facts = facts
        self._engine = engine
        self._service = service
        self._transfer = transfer
        self._settings = settings
        self._spans = spans
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._ended = threading.Event()
        self.address = ""
        self.failed = False

    def start(self) -> str:
        """Begin to step and to listen; the address for routers. Raises ConfigError when the port is taken."""
        self.address = self._service.start(self._engine, self._settings.host, self._settings.port)
        gc.collect()
        gc.freeze()  # what is loaded stays: later collections need not walk it in the middle of a step
        self._thread.start()
        return self.address

    def stop(self, drain_s: float = 0.0) -> None:
        """Refuse new work, let what runs end within `drain_s`, then cut the streams. Safe to call twice."""
        if drain_s > 0:
            self.drain()
            give_up = time.monotonic() + drain_s
            while not self.drained and time.monotonic() < give_up and not self._ended.wait(_POLL_S):
                pass
        self._engine.stop()
        if self._thread.is_alive():
            self._thread.join(_LAST_STEP_S)
        self._service.stop()
        self._transfer.stop()
        if self._spans is not None:
            self._spans.close()

    def drain(self) -> None:
        """Refuse new work from now on."""
        self._engine.post("", Drain())

    @property
    def drained(self) -> bool:
        """Drain was asked for, and nothing is left."""
        return self._engine.drained

    def join(self, timeout_s: float | None = None) -> bool:
        """True once the engine has ended, by `stop` or by failure (see `failed`)."""
        return self._ended.wait(timeout_s)

    def _run(self) -> None:
        try:
            self._engine.run()
        except Exception:  # the edge of the engine thread: whatever it was, the process must end and say so
            log.exception("the engine failed; the worker ends")
            self.failed = True
        finally:
            self._ended.set()


def build_worker(settings: WorkerSettings, faults: TransferFaults | None = None) -> Worker:
    """Load and connect everything; nothing is served yet. Raises ConfigError, ModelError. `faults` are for tests."""
    began = time.monotonic()
    awake = threading.Event()
    computing = _build_runner(settings)
    storage, layout = computing.storage, computing.layout
    pool = BlockPool(storage.num_blocks, storage.generations)
    cache = PrefixCache(pool) if settings.kv.prefix_caching else None
    scheduler = Scheduler(settings.scheduler, layout, pool, cache)
    host = host_id()
    transfer = TransferEngine(
        settings.transfer,
        storage,
        worker_id=settings.worker_id,
        epoch=settings.incarnation,
        host_id=host,
        compatibility=layout.compatibility,
        cluster_key=settings.cluster_key,
        wake=awake.set,
        clock=time.monotonic,
        faults=faults,
    )
    service = WorkerService(
        _welcome(settings, storage.num_blocks, transfer.address, host, layout.compatibility),
        settings.heartbeat_s,
        settings.cluster_key,
    )
    identity = GranterIdentity(
        settings.worker_id, settings.incarnation, host, layout.compatibility, settings.transfer.lease_s
    )
    sink = open_sink(settings.tracing, settings.worker_id)
    tracer = WorkerTracer(sink, settings.worker_id) if sink is not None else None
    observation = Observation(storage.block_bytes, tracer)
    handover = HandOver(transfer, identity, lambda: os.urandom(_SESSION_ID_BYTES), observation)
    feed = KVEventFeed(cache, service)
    parts = EngineParts(scheduler, computing.runner, handover, feed, service, observation, computing.prepare)
    engine = Engine(parts, time.monotonic, awake)
    facts = _facts(settings, storage, transfer.address, time.monotonic() - began)
    return Worker(settings, facts, engine, service, transfer, sink)


@dataclass(frozen=True, slots=True)
class _Computing:
    """What computes, and the pool that it writes as the others see it."""

    runner: Runner
    storage: BlockStorage
    layout: KVLayout
    prepare: Callable[[], bool] | None = None  # see EngineParts


def _build_runner(settings: WorkerSettings) -> _Computing:
    """The runner with the storage it writes: the layout decides how large the storage is."""
    if settings.runner.kind == "oracle":
        layout = oracle_layout(settings.runner, settings.kv)
        storage = _create_storage(settings, layout)
        return _Computing(OracleRunner(settings.runner, layout, storage.data), storage, layout)
    if settings.runner.kind != "model":
        raise ConfigError(f"unknown runner {settings.runner.kind!r}; known: model, oracle", "runner.kind")
    # Late: torch takes seconds to import, and half of the workers' tests run without it.
    from penstock.workers.model_build import build_model_runner

    model = build_model_runner(settings.runner, settings.kv, settings.scheduler)
    if model.device.type == "cpu":
        storage = _create_storage(settings, model.layout)
        model.attach(storage)
        return _Computing(model, storage, model.layout)
    from penstock.workers.device_pool import PoolWish, open_pool
    from penstock.workers.device_transfer import CardStorage

    needed = model.layout.blocks_for(settings.scheduler.max_model_len)
    pool = open_pool(model, PoolWish(settings.kv, needed, settings.runner.record_dir))
    return _Computing(model, CardStorage(pool), model.layout, model.use_idle_time)


def _create_storage(settings: WorkerSettings, layout: KVLayout) -> KVStorage:
    num_blocks = settings.kv.num_blocks or settings.kv.memory_bytes // layout.block_bytes
    needed = layout.blocks_for(settings.scheduler.max_model_len)
    if num_blocks < needed:
        raise ConfigError(
            f"the KV pool holds {num_blocks} blocks of {layout.block_bytes} bytes, and one sequence of max_model_len "
            f"{settings.scheduler.max_model_len} needs {needed}: give more KV memory or lower max_model_len",
            "kv.num_blocks" if settings.kv.num_blocks else "kv.memory_bytes",
        )
    return KVStorage.create(num_blocks, layout.block_bytes)


def _welcome(
    settings: WorkerSettings, num_blocks: int, transfer_address: str, host: str, compatibility: str
) -> Welcome:
    return Welcome(
        wire_version=WIRE_VERSION,
        worker_id=settings.worker_id,
        incarnation=settings.incarnation,
        role=settings.role,
        pid=os.getpid(),
        width=1,
        block_size=settings.kv.block_size,
        num_blocks=num_blocks,
        max_num_seqs=settings.scheduler.max_num_seqs,
        max_model_len=settings.scheduler.max_model_len,
        max_num_batched_tokens=settings.scheduler.max_num_batched_tokens,
        transfer_address=transfer_address,
        host_id=host,
        compatibility=compatibility,
    )


def _facts(settings: WorkerSettings, storage: BlockStorage, transfer_address: str, load_s: float) -> WorkerFacts:
    return WorkerFacts(
        worker_id=settings.worker_id,
        transfer_address=transfer_address,
        pid=os.getpid(),
        num_blocks=storage.num_blocks,
        block_size=settings.kv.block_size,
        kv_bytes=storage.num_blocks * storage.block_bytes,
        load_s=load_s,
    )
