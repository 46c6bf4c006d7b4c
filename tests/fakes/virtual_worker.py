"""One simulated worker under a virtual clock, with the router's link to it; `virtual_cluster.py` owns them.

Engine, scheduler, prefix cache and oracle are the code that serves. What the engine says leaves when the step's time
has passed, and every message takes the wire's latency, in order.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

from fakes.loopback_transfer import LoopbackFabric, LoopbackTransfer

from penstock.cluster.channel import Order, Seat
from penstock.router.router import Router
from penstock.workers.engine import Attached, Drain, Engine, EngineParts
from penstock.workers.handover import GranterIdentity, HandOver
from penstock.workers.kv.banks import Bank
from penstock.workers.kv.block_pool import BlockPool
from penstock.workers.kv.prefix_cache import PrefixCache
from penstock.workers.kv.storage import KVStorage
from penstock.workers.kv_feed import KVEventFeed
from penstock.workers.oracle import OracleRunner, oracle_layout
from penstock.workers.protocol import (
    WIRE_VERSION,
    Cancel,
    Embedding,
    Failed,
    Granted,
    KVEvents,
    KVSnapshot,
    Load,
    PromptLogprobs,
    Queued,
    RequestSnapshot,
    Role,
    Started,
    Stays,
    TokenFrame,
    ToRouter,
    Welcome,
)
from penstock.workers.scheduler.plan import StepPlan, StepResult
from penstock.workers.scheduler.scheduler import Scheduler
from penstock.workers.settings import KVSettings, RunnerSettings, SchedulerSettings

VOCAB = 5000
ROUTER = "router"


@dataclass(frozen=True)
class Shape:
    """What a simulated worker can hold and how fast it is."""

    block_size: int = 4
    num_blocks: int = 512
    max_num_seqs: int = 32
    chunk: int = 64
    max_waiting: int = 1024
    reserve_tokens: int = 16
    step_s: float = 0.005
    token_s: float = 0.0001
    latency_s: float = 0.0005
    transfer_s: float = 0.002
    heartbeat_s: float = 0.5


class World(Protocol):
    """What a worker needs of its cluster."""

    shape: Shape
    fabric: LoopbackFabric
    router: Router
    poison: set[tuple[int, ...]]

    def now(self) -> float: ...
    def later(self, delay_s: float, call: Callable[[], None]) -> None: ...
    def kill(self, worker_id: str) -> None: ...
    def pump_later(self) -> None: ...
    def sessions(self) -> int: ...


class Outbox:
    """Reporter of one engine: what it says leaves when the step's time has passed."""

    def __init__(self) -> None:
        self.messages: list[ToRouter] = []

    def send(self, router_id: str, message: ToRouter) -> None:
        self.messages.append(message)

    def broadcast(self, message: ToRouter) -> None:
        self.messages.append(message)

    def cut(self, router_id: str) -> None:
        raise AssertionError("the lease of a living router ended")


class PoisonableRunner:
    """Notices when a step computes a poisonous prompt; the process dies of that step."""

    def __init__(self, inner: OracleRunner, scheduler: Scheduler, poison: set[tuple[int, ...]]) -> None:
        self.inner, self.scheduler, self.poison = inner, scheduler, poison
        self.layout, self.vocab_size = inner.layout, inner.vocab_size
        self.poisoned = False

    def run(self, plan: StepPlan) -> StepResult:
        rows = [self.scheduler._table.sequences[slot] for slot in plan.slots.tolist()]
        self.poisoned |= any(row is not None and row.request.prompt in self.poison for row in rows)
        return self.inner.run(plan)


class VirtualWorker:
    """One incarnation of a worker, with the router's link to it. Implements `cluster/channel.py:Post`."""

    def __init__(self, cluster: World, worker_id: str, role: Role, incarnation: int) -> None:
        self.cluster, self.worker_id, self.role, self.incarnation = cluster, worker_id, role, incarnation
        self.shape = shape = cluster.shape
        self.alive = True
        self.seats: dict[int, Seat] = {}
        self.attached = False
        self.computed_tokens = 0
        self._slots = itertools.count(1)
        self._cost_s = 0.0
        # timers of one moment have no order, a connection has: each timer delivers whatever is next
        self._inbound: deque[Order | RequestSnapshot | Drain | Cancel] = deque()
        self._outbound: deque[tuple[ToRouter, ...]] = deque()
        self._wake = asyncio.Event()
        self._thaw = asyncio.Event()
        self._thaw.set()
        self._build(shape)
        self.tasks = [asyncio.ensure_future(self._run()), asyncio.ensure_future(self._beat())]

    def _build(self, shape: Shape) -> None:
        loop = asyncio.get_running_loop()
        settings = RunnerSettings(
            kind="oracle", oracle_vocab=VOCAB, oracle_step_s=shape.step_s, oracle_token_s=shape.token_s
        )
        kv = KVSettings(block_size=shape.block_size, num_blocks=shape.num_blocks)
        layout = oracle_layout(settings, kv)
        self.storage = KVStorage.create(shape.num_blocks, layout.block_bytes)
        self.pool = BlockPool(shape.num_blocks, self.storage.generations)
        cache = PrefixCache(self.pool)
        limits = SchedulerSettings(
            max_num_seqs=shape.max_num_seqs,
            max_num_batched_tokens=shape.chunk,
            max_model_len=2048,
            max_waiting=shape.max_waiting,
            reserve_tokens=shape.reserve_tokens,
        )
        self.scheduler = Scheduler(limits, layout, Bank(self.pool, cache))
        self.transfer = LoopbackTransfer(self.cluster.fabric, f"{self.worker_id}.{self.incarnation}", self.storage)
        self.outbox = Outbox()
        oracle = OracleRunner(settings, layout, self.storage.data, loop.time, self._spend)
        self.runner = PoisonableRunner(oracle, self.scheduler, self.cluster.poison)
        identity = GranterIdentity(self.worker_id, self.incarnation, "host", layout.compatibility, 10.0)
        serial = itertools.count(self.cluster.sessions())
        handover = HandOver(self.transfer, identity, lambda: next(serial).to_bytes(16, "big"))
        parts = EngineParts(self.scheduler, self.runner, handover, KVEventFeed(cache, self.outbox), self.outbox)
        self.engine = Engine(parts, loop.time, threading.Event())
        self.engine.post(ROUTER, Attached(1e9))
        self.welcome = Welcome(
            WIRE_VERSION, self.worker_id, self.incarnation, self.role, 0, 1, shape.block_size, shape.num_blocks,
            shape.max_num_seqs, 2048, shape.chunk, self.transfer.address, "host", layout.compatibility,
        )  # fmt: skip

    def _spend(self, seconds: float) -> None:
        self._cost_s += seconds

    # --- the worker's side ----------------------------------------------------------------------------------------

    async def _run(self) -> None:
        while True:
            self._wake.clear()
            worked = self.engine.step()
            cost_s, self._cost_s = self._cost_s, 0.0
            if worked:
                if self.runner.poisoned:
                    self.cluster.kill(self.worker_id)
                    return
                await asyncio.sleep(cost_s)
            await self._thaw.wait()
            self._flush()
            self.cluster.pump_later()
            if not worked:
                try:
                    async with asyncio.timeout(0.25):
                        await self._wake.wait()
                except TimeoutError:
                    pass

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(self.shape.heartbeat_s)
            shape = self.shape  # its line is known: nobody measures steps by this clock
            load = replace(self.engine.load(), step_base_s=shape.step_s, step_token_s=shape.token_s)
            self.deliver(load if self._thaw.is_set() else replace(load, step_age_s=1e3))

    def _flush(self) -> None:
        messages, self.outbox.messages = self.outbox.messages, []
        self.deliver(*messages)

    def freeze(self) -> None:
        """Its step never ends; the heartbeat goes on and says so."""
        self._thaw.clear()

    def wake(self) -> None:
        self._wake.set()

    # --- the link's side ------------------------------------------------------------------------------------------

    def occupy(self, seat: Seat) -> int:
        slot = next(self._slots)
        self.seats[slot] = seat
        return slot

    def post(self, order: Order | RequestSnapshot | Drain | Cancel) -> None:
        self._inbound.append(order)
        self.cluster.later(self.shape.latency_s, self._receive)

    def vacate(self, seat: Seat, cancel: bool) -> None:
        if self.seats.pop(seat.slot, None) is not None and cancel:
            self.post(Cancel(seat.slot, seat.attempt))

    def _receive(self) -> None:
        message = self._inbound.popleft()
        if self.alive:
            self.engine.post(ROUTER, message)
            self.wake()

    def deliver(self, *messages: ToRouter) -> None:
        """What the worker says reaches the router a little later, in order."""
        self._outbound.append(messages)
        self.cluster.later(self.shape.latency_s, self._hear)

    def _hear(self) -> None:
        for message in self._outbound.popleft():
            self._arrive(message)

    def _arrive(self, message: ToRouter) -> None:
        if not self.attached:
            return
        router, now = self.cluster.router, self.cluster.now()
        match message:
            case TokenFrame():
                self._apply(message)
            case Queued() | Granted() | Started() | Failed() | Stays():
                seat = self.seats.get(message.slot)
                if seat is not None and seat.attempt == message.attempt:
                    seat.answer(message)
            case PromptLogprobs() | Embedding():
                seat = self.seats.get(message.slot)
                if seat is not None and seat.attempt == message.attempt:
                    seat.learn(message)
            case Load():
                router.load_arrived(self.worker_id, message, now)
            case KVEvents():
                if router.kv_events(self.worker_id, message):
                    self.post(RequestSnapshot())
            case KVSnapshot():
                router.kv_snapshot(self.worker_id, message)

    def _apply(self, frame: TokenFrame) -> None:
        begin = 0
        tokens = frame.tokens.tolist()
        rows = zip(
            frame.slots.tolist(), frame.attempts.tolist(), frame.starts.tolist(), frame.counts.tolist(),
            frame.ends.tolist(), strict=True,
        )  # fmt: skip
        for slot, attempt, start, count, end in rows:
            seat = self.seats.get(slot)
            if seat is not None and seat.attempt == attempt:
                seat.apply(start, tokens[begin : begin + count], end)
            begin += count
