"""Puts one worker together out of its settings and runs it: storage, scheduler, runner, transfer, engine, service.

Used by `process.py` (plain subprocess) and `actor.py` (Ray actor); the one place that knows every part of a worker.
What computes is built by `computing.py`,
the ranks of a group are joined by `group_assembly.py`.
"""

from __future__ import annotations

import gc
import logging
import os
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from penstock.workers import fault_points
from penstock.workers.audit import AuditLog
from penstock.workers.computing import Computing, build_computing
from penstock.workers.engine import Engine, EngineParts
from penstock.workers.grammar_store import GrammarStore, open_grammars
from penstock.workers.group_assembly import (
    attention_ranks,
    bank_addresses,
    lead_computing,
    lead_transfer,
    rank_transfer,
)
from penstock.workers.handover import GranterIdentity, HandOver
from penstock.workers.inbox import Drain
from penstock.workers.kv.banks import Bank, BankedCaches, make_banks
from penstock.workers.kv.layout import KVLayout
from penstock.workers.kv.tiers import KVTiers
from penstock.workers.kv_feed import CacheEvents, KVEventFeed
from penstock.workers.observation import Observation
from penstock.workers.parallel.group_transfer import GroupTransfer
from penstock.workers.parallel.leader import GroupLeader
from penstock.workers.protocol import WIRE_VERSION, Welcome
from penstock.workers.scheduler.scheduler import Scheduler
from penstock.workers.service import WorkerService
from penstock.workers.settings import WorkerSettings
from penstock.workers.spans import SpanSink, open_sink
from penstock.workers.step_time import StepTimeModel
from penstock.workers.tier_assembly import open_tiers
from penstock.workers.tls import open_peer_tls
from penstock.workers.totals import AdapterTotals, GrammarTotals, TierTotals, WeightFigures
from penstock.workers.tracing import WorkerTracer
from penstock.workers.transfer.engine import TransferEngine
from penstock.workers.transfer.host import host_id
from penstock.workers.transfer.port import BlockStorage

if TYPE_CHECKING:
    from penstock.workers.lora.store import AdapterStore
    from penstock.workers.weights.supply import WeightSupply

log = logging.getLogger(__name__)

_SESSION_ID_BYTES = 16
_POLL_S = 0.02
# What routers sent before they heard of the drain is still refused by its name, and last words reach them.
_LINGER_S = 1.0
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
    weights_address: str  # where rank 0 serves its weights to workers that start; empty: nowhere


class Store(Protocol):
    """What keeps something for requests, with threads of its own."""

    def stop(self) -> None:
        """End them."""
        ...


class Worker:
    """A worker that is built; `start` serves, `stop` drains and ends, `join` waits for the end."""

    def __init__(
        self,
        settings: WorkerSettings,
        facts: WorkerFacts,
        engine: Engine,
        service: WorkerService,
        transfer: TransferEngine | GroupTransfer,
        spans: SpanSink | None = None,
        leader: GroupLeader | None = None,
        supply: WeightSupply | None = None,
        stores: tuple[Store, ...] = (),
    ) -> None:
        self._stores = stores
        self.facts = facts
        self._engine = engine
        self._service = service
        self._transfer = transfer
        self._settings = settings
        self._spans = spans
        self._leader = leader
        self._supply = supply
        if supply is not None and supply.server is not None:
            supply.server.give_way_to(lambda: engine.load().transfers > 0)
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
            now = time.monotonic()
            give_up, quiet_until = now + drain_s, now + _LINGER_S
            while now < min(give_up, quiet_until) and not self._ended.wait(_POLL_S):
                now = time.monotonic()
                if not self.drained:
                    quiet_until = now + (_LINGER_S if self._service.attached else 0.0)
        if self._supply is not None:
            self._supply.stop()
        self._engine.stop()
        if self._thread.is_alive():
            self._thread.join(_LAST_STEP_S)
        self._service.stop()
        self._transfer.stop()
        for store in self._stores:
            store.stop()
        if self._leader is not None:
            self._leader.stop()
        if self._spans is not None:
            self._spans.close()

    def drain(self) -> None:
        """Refuse new work from now on, and takers of weights."""
        if self._supply is not None and self._supply.server is not None:
            self._supply.server.close("it drains")
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


def build_worker(settings: WorkerSettings, leader: GroupLeader | None = None) -> Worker:
    """Load and connect everything; nothing is served yet. Raises ConfigError, ModelError.

    `leader`: this is rank 0 of a group; returns when all its ranks have loaded. Raises GroupError when one cannot.
    """
    began, awake = time.monotonic(), threading.Event()
    count = attention_ranks(settings)
    computing, num_blocks = _build_computing(settings, leader)
    storage, layout = computing.storage, computing.layout
    banks = _open_banks(settings, storage, count, num_blocks, leader)
    caches = [bank.cache for bank in banks if bank.cache is not None]
    grammars = _open_grammars(settings, computing, awake)
    adapters = _open_adapters(settings, computing, leader, awake)
    opened, step_time = open_tiers(settings, storage, layout, awake.set), StepTimeModel()
    tiers = None if opened is None else opened.tiers
    below = None if tiers is None else (tiers, step_time.predict)
    scheduler = Scheduler(settings.scheduler, layout, *banks, grammars=grammars, adapters=adapters, tiers=below)
    host = host_id()
    own_transfer = rank_transfer(settings, computing, awake.set)
    transfer = own_transfer if leader is None else lead_transfer(settings, leader, own_transfer, num_blocks, awake.set)
    service = WorkerService(
        _welcome(settings, count * num_blocks, transfer.address, host, layout),
        settings.heartbeat_s,
        settings.cluster_key,
        transfer.stats,
        open_peer_tls(settings.tls),
    )
    identity = GranterIdentity(
        settings.worker_id,
        settings.incarnation,
        host,
        layout.compatibility,
        settings.transfer.lease_s,
        bank_addresses(own_transfer.address, leader, count),
    )
    sink = open_sink(settings.tracing, settings.worker_id)
    observation = _observation(settings, computing, sink, grammars, tiers, adapters)
    handover = HandOver(transfer, identity, lambda: os.urandom(_SESSION_ID_BYTES), observation)
    told: CacheEvents | None = BankedCaches(caches) if len(caches) > 1 else next(iter(caches), None)
    feed = KVEventFeed(told if told is None or opened is None else opened.over(told), service)
    prepare, start, name = computing.prepare, computing.start, settings.worker_id
    parts = EngineParts(
        scheduler, computing.runner, handover, feed, service, observation, prepare, start, step_time, name
    )
    engine = Engine(parts, fault_points.clock_of(name), awake)
    facts = WorkerFacts(
        worker_id=settings.worker_id,
        transfer_address=transfer.address,
        pid=os.getpid(),
        num_blocks=count * num_blocks,
        block_size=settings.kv.block_size,
        kv_bytes=count * num_blocks * storage.block_bytes,
        load_s=time.monotonic() - began,
        weights_address="" if computing.supply is None else computing.supply.address,
    )
    stores = tuple(store for store in (grammars, adapters, tiers) if store is not None)
    return Worker(settings, facts, engine, service, transfer, sink, leader, computing.supply, stores)


def _open_banks(
    settings: WorkerSettings, storage: BlockStorage, count: int, num_blocks: int, leader: GroupLeader | None
) -> list[Bank]:
    """One for each attention rank; sequences on others have blocks that no storage of this process holds."""
    generations = storage.generations[:num_blocks] if count == 1 else np.zeros(count * num_blocks, np.uint64)
    banks = make_banks(count, num_blocks, generations, prefix_caching=settings.kv.prefix_caching)
    if leader is not None:
        leader.sender.announce(generations, storage.generations[:num_blocks] if count > 1 else None)
    return banks


def _open_grammars(settings: WorkerSettings, computing: Computing, awake: threading.Event) -> GrammarStore | None:
    """Before anything is served: reading a large vocabulary would hold up a step."""
    if settings.runner.kind != "model":
        return None
    return open_grammars(settings.runner.model_dir, computing.runner.vocab_size, awake.set)


def _open_adapters(
    settings: WorkerSettings, computing: Computing, leader: GroupLeader | None, awake: threading.Event
) -> AdapterStore | None:
    """None where no adapters are served. Raises ConfigError."""
    bank = None if computing.model is None else computing.model.adapters
    if bank is None:
        return None
    # Late: both import torch.
    from penstock.workers.lora.store import AdapterStore
    from penstock.workers.parallel.group_adapters import GroupAdapters

    room = bank if leader is None else GroupAdapters(bank, leader.sender.send)
    return AdapterStore(settings.adapters, bank.sizes, room, awake.set, settings.worker_id)


def _observation(
    settings: WorkerSettings,
    computing: Computing,
    sink: SpanSink | None,
    grammars: GrammarStore | None,
    tiers: KVTiers | None,
    adapters: AdapterStore | None,
) -> Observation:
    tracer = WorkerTracer(sink, settings.worker_id) if sink is not None else None
    weights = WeightFigures if computing.supply is None else computing.supply.figures
    return Observation(
        computing.storage.block_bytes,
        tracer,
        group=computing.group_totals,
        weights=weights,
        grammars=GrammarTotals if grammars is None else grammars.totals,
        audit=AuditLog(settings.ledger.share) if settings.ledger.share > 0 else None,
        tiers=TierTotals if tiers is None else tiers.totals,
        adapters=AdapterTotals if adapters is None else adapters.totals,
    )


def _build_computing(settings: WorkerSettings, leader: GroupLeader | None) -> tuple[Computing, int]:
    """What computes, and the blocks of a bank."""
    if leader is not None:
        return lead_computing(settings, leader)
    computing = build_computing(settings)
    return computing, computing.storage.num_blocks


def _welcome(settings: WorkerSettings, num_blocks: int, transfer_address: str, host: str, layout: KVLayout) -> Welcome:
    return Welcome(
        wire_version=WIRE_VERSION,
        worker_id=settings.worker_id,
        incarnation=settings.incarnation,
        role=settings.role,
        pid=os.getpid(),
        width=layout.tensor_width,
        block_size=settings.kv.block_size,
        num_blocks=num_blocks,
        max_num_seqs=settings.scheduler.max_num_seqs,
        max_model_len=settings.scheduler.max_model_len,
        max_num_batched_tokens=settings.scheduler.max_num_batched_tokens,
        transfer_address=transfer_address,
        host_id=host,
        compatibility=layout.compatibility,
    )
