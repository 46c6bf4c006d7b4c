"""Joins gRPC streams to the engine: greets routers, fences their epochs, and carries messages both ways.

Owned by `assembly.py`. Two threads: one runs the asyncio loop with `rpc.RpcServer`, one beats: it sends every router
the worker's load, also while a step is stuck. As the engine's reporter it takes messages from any thread into one
bounded outbox per stream; each wakes the loop at most once per batch.

A stream that breaks ends its router's work here at once, because routers end it on their side at the same moment;
each attached stream gets a name of its own, so nothing of a stream before can be taken for something of the next.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from penstock.workers import fault_points
from penstock.workers.audit import WorkerAudit
from penstock.workers.call_seal import WorkerName
from penstock.workers.engine import Engine
from penstock.workers.errors import ConfigError, RefusedError, WireError
from penstock.workers.fault_points import Point
from penstock.workers.inbox import Attached, Detached
from penstock.workers.outbox import Outbox
from penstock.workers.protocol import (
    OLDEST_WIRE_VERSION,
    WIRE_VERSION,
    Failed,
    FailureCode,
    Generate,
    Hello,
    Prefill,
    Reserve,
    ToRouter,
    Welcome,
)
from penstock.workers.rpc import Conversation, RpcServer
from penstock.workers.tls import PeerTls
from penstock.workers.transfer.endpoint import TransferCounters
from penstock.workers.wire import encode

log = logging.getLogger(__name__)

_KNOWN_EPOCHS = 1024  # routers whose last epoch is remembered after they left
_MAX_LEASE_S = 3600.0
_HELLO_WITHIN_S = 10.0
_AUDIT_WITHIN_S = 5.0


@dataclasses.dataclass(slots=True)
class _Stream:
    """One attached router: its outbox, and what its tasks wait for."""

    name: str
    outbox: Outbox
    ready: asyncio.Event  # the outbox has something
    over: asyncio.Event  # the outbox is closed; set also while the writer is stuck behind a reader that stopped


class WorkerService:
    """Reporter of the engine and server of the routers."""

    def __init__(
        self,
        welcome: Welcome,
        heartbeat_s: float,
        cluster_key: str = "",
        transfers: Callable[[], TransferCounters] = TransferCounters,
        tls: PeerTls | None = None,
    ) -> None:
        """`transfers`: the transfer side's counters, for the ledger."""
        self._welcome = welcome
        self._transfers = transfers
        self._heartbeat_s = heartbeat_s
        name = WorkerName(welcome.worker_id, welcome.incarnation)
        self._rpc = RpcServer(self._attach, self._status, cluster_key, name, self._audit, tls)
        self._engine: Engine
        self._loop: asyncio.AbstractEventLoop
        self._streams: dict[str, _Stream] = {}  # written on the loop; read by all
        self._current: OrderedDict[str, tuple[int, str]] = OrderedDict()  # router id -> (epoch, stream name)
        self._serial = itertools.count(1)
        self._stopping = threading.Event()
        self._threads = (
            threading.Thread(target=self._run_loop, name="rpc", daemon=True),
            threading.Thread(target=self._beat, name="heartbeat", daemon=True),
        )

    # --- the owner's calls ---

    def start(self, engine: Engine, host: str, port: int) -> str:
        """Serve; the address taken. Raises ConfigError when the port is not free."""
        self._engine = engine
        self._loop = asyncio.new_event_loop()
        rpc, beat = self._threads
        rpc.start()
        try:
            address = asyncio.run_coroutine_threadsafe(self._rpc.start(host, port), self._loop).result()
        except ConfigError:
            self._loop.call_soon_threadsafe(self._loop.stop)
            rpc.join()
            raise
        beat.start()
        return address

    def stop(self) -> None:
        """Cut every stream and end both threads."""
        if self._stopping.is_set() or not self._threads[0].is_alive():
            return
        self._stopping.set()
        done: Future[None] = asyncio.run_coroutine_threadsafe(self._rpc.stop(), self._loop)
        with contextlib.suppress(TimeoutError):
            done.result(5.0)
        self._loop.call_soon_threadsafe(self._loop.stop)
        for thread in self._threads:
            thread.join()

    @property
    def attached(self) -> int:
        """Routers at the moment; from any thread."""
        return len(self._streams)

    # --- the engine's calls (Reporter), from any thread ---

    def send(self, router_id: str, message: ToRouter) -> None:
        """Queue a message for one attached stream."""
        stream = self._streams.get(router_id)
        if stream is not None:
            stream.outbox.push(message)

    def broadcast(self, message: ToRouter) -> None:
        """Queue a message for every attached stream."""
        for stream in list(self._streams.values()):
            stream.outbox.push(message)

    def cut(self, router_id: str) -> None:
        """End a stream."""
        stream = self._streams.get(router_id)
        if stream is not None:
            stream.outbox.close()

    # --- RPC thread ---

    def _run_loop(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()
        pending = asyncio.all_tasks(self._loop)
        for task in pending:
            task.cancel()
        if pending:
            self._loop.run_until_complete(asyncio.gather(*pending, return_exceptions=True))
        self._loop.close()

    async def _attach(self, conversation: Conversation) -> None:
        """The life of one stream."""
        hello = await self._greet(conversation)
        stream = self._open(hello)
        welcome = dataclasses.replace(self._welcome, wire_version=hello.wire_version)
        await conversation.write(encode(welcome, hello.wire_version))
        tasks = [asyncio.create_task(self._write(stream, conversation))]
        tasks.append(asyncio.create_task(self._read(stream, conversation)))
        for task in tasks:
            task.add_done_callback(lambda _: stream.over.set())
        try:
            await stream.over.wait()
        finally:
            overflowed = stream.outbox.overflowed
            self._close(stream)
            for task in tasks:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            log.info("router %s at %s detached", stream.name, conversation.peer)
        if overflowed:
            raise RefusedError(FailureCode.OVERLOADED, "the router reads too slowly")
        for result in results:
            if isinstance(result, Exception):  # a cancelled task's result is none
                raise result

    async def _greet(self, conversation: Conversation) -> Hello:
        try:
            hello = await asyncio.wait_for(conversation.read(), _HELLO_WITHIN_S)
        except TimeoutError:
            raise WireError("no hello") from None
        if not isinstance(hello, Hello):
            raise WireError(f"began with {type(hello).__name__} instead of Hello")
        if not OLDEST_WIRE_VERSION <= hello.wire_version <= WIRE_VERSION:
            spoken = f"not {OLDEST_WIRE_VERSION} to {WIRE_VERSION}"
            raise RefusedError(FailureCode.INCOMPATIBLE, f"wire version {hello.wire_version}, {spoken}")
        if not 0 < hello.lease_s <= _MAX_LEASE_S:
            raise WireError(f"Hello.lease_s: {hello.lease_s} is outside (0, {_MAX_LEASE_S}]")
        return hello

    def _open(self, hello: Hello) -> _Stream:
        """Fence older instances of the router, then let this one in."""
        epoch, before = self._current.get(hello.router_id, (0, ""))
        if hello.router_epoch < epoch:
            raise RefusedError(FailureCode.INCOMPATIBLE, f"router {hello.router_id} was here with epoch {epoch}")
        if before in self._streams:
            self._close(self._streams[before])
        name = f"{hello.router_id}/{hello.router_epoch}/{next(self._serial)}"
        outbox = Outbox(lambda: self._poke(name), version=hello.wire_version)
        stream = _Stream(name, outbox, asyncio.Event(), asyncio.Event())
        self._current[hello.router_id] = (hello.router_epoch, stream.name)
        self._current.move_to_end(hello.router_id)
        while len(self._current) > _KNOWN_EPOCHS:
            self._current.popitem(last=False)
        self._streams[stream.name] = stream
        self._engine.post(stream.name, Attached(hello.lease_s))
        outbox.push(self._engine.load())  # so that the router need not wait for a beat to know anything
        log.info("router %s attached", stream.name)
        return stream

    def _close(self, stream: _Stream) -> None:
        stream.over.set()
        stream.outbox.close()
        if self._streams.pop(stream.name, None) is not None:
            self._engine.post(stream.name, Detached())

    def _poke(self, name: str) -> None:
        """Called by an outbox, from any thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: the worker is going down
            self._loop.call_soon_threadsafe(self._rouse, name)

    def _rouse(self, name: str) -> None:
        stream = self._streams.get(name)
        if stream is not None:
            stream.ready.set()
            if stream.outbox.closed:
                stream.over.set()

    async def _read(self, stream: _Stream, conversation: Conversation) -> None:
        while (message := await conversation.read()) is not None:
            posted = self._engine.post(stream.name, message)
            if not posted and isinstance(message, Reserve | Prefill | Generate):
                refusal = Failed(
                    message.slot, message.attempt, FailureCode.QUEUE_FULL, "the worker's inbox is full", 1.0
                )
                stream.outbox.push(refusal)

    async def _write(self, stream: _Stream, conversation: Conversation) -> None:
        while True:
            await stream.ready.wait()
            stream.ready.clear()
            for data in stream.outbox.take():
                await conversation.write(data)

    def _status(self) -> dict[str, Any]:
        about, load = dataclasses.asdict(self._welcome), dataclasses.asdict(self._engine.load())
        del load["totals"]  # for the metrics page, in the heartbeat
        state = "draining" if load["draining"] else "ready"
        return {"state": state, "routers": len(self._streams), **about, "load": load}

    async def _audit(self, ended_after: int) -> dict[str, Any]:
        """See `audit.WorkerAudit`. Raises TimeoutError when a step is stuck."""
        account = await asyncio.wait_for(asyncio.wrap_future(self._engine.inspect(ended_after)), _AUDIT_WITHIN_S)
        about = self._welcome
        return dataclasses.asdict(
            WorkerAudit(about.worker_id, about.incarnation, account, dataclasses.asdict(self._transfers()))
        )

    # --- heartbeat thread ---

    def _beat(self) -> None:
        while not self._stopping.wait(self._heartbeat_s):
            for _ in range(fault_points.times(Point.HEARTBEAT, self._welcome.worker_id)):
                self.broadcast(self._engine.load())
