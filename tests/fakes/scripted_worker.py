"""A worker that only talks: a real RPC server whose answers the test writes line by line."""

from __future__ import annotations

import asyncio
import contextlib

import numpy as np

from penstock.cluster.roster import Roster, RosterEntry, WorkerState
from penstock.workers.call_seal import WorkerName
from penstock.workers.protocol import (
    WIRE_VERSION,
    Hello,
    KeepAlive,
    RequestSnapshot,
    Role,
    TokenFrame,
    ToRouter,
    ToWorker,
    Welcome,
)
from penstock.workers.rpc import Conversation, RpcServer
from penstock.workers.wire import encode

KEY = "cd" * 32


def welcome(worker_id: str = "w", role: Role = Role.MIXED, **changed: object) -> Welcome:
    fields: dict[str, object] = {
        "wire_version": WIRE_VERSION,
        "worker_id": worker_id,
        "incarnation": 1,
        "role": role,
        "pid": 1,
        "width": 1,
        "block_size": 16,
        "num_blocks": 1000,
        "max_num_seqs": 64,
        "max_model_len": 4096,
        "max_num_batched_tokens": 512,
        "transfer_address": "127.0.0.1:1",
        "host_id": "h",
        "compatibility": "c",
    }
    return Welcome(**{**fields, **changed})  # type: ignore[arg-type]


def frame(*rows: tuple[int, int, int, list[int], int], step: int = 1) -> TokenFrame:
    """Rows of (slot, attempt, start, tokens, end)."""
    return TokenFrame(
        step,
        np.array([row[0] for row in rows], np.uint32),
        np.array([row[1] for row in rows], np.uint16),
        np.array([row[2] for row in rows], np.uint32),
        np.array([len(row[3]) for row in rows], np.uint16),
        np.array([row[4] for row in rows], np.uint8),
        np.array([token for row in rows for token in row[3]], np.int32),
    )


class ScriptedWorker:
    """Greets every router; `heard` holds what comes (renewals and snapshot requests aside), `say` answers."""

    def __init__(self, worker_id: str = "w", role: Role = Role.MIXED, **changed: object) -> None:
        self.welcome = welcome(worker_id, role, **changed)
        self.heard: asyncio.Queue[ToWorker] = asyncio.Queue()
        self.hellos: list[Hello] = []
        self.snapshot_requests = 0
        self.renewals = 0
        self.address = ""
        self._server = RpcServer(self._attach, lambda: {}, KEY, WorkerName(worker_id, self.welcome.incarnation))
        self._talk: Conversation | None = None
        self._cut = asyncio.Event()
        self._attached = asyncio.Event()

    async def __aenter__(self) -> ScriptedWorker:
        self.address = await self._server.start("127.0.0.1", 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._cut.set()
        await self._server.stop()

    def entry(self, **changed: object) -> RosterEntry:
        fields: dict[str, object] = {"state": WorkerState.READY, "address": self.address, "pids": (1,), "width": 1}
        fields |= {"worker_id": self.welcome.worker_id, "role": self.welcome.role, "incarnation": 1}
        return RosterEntry(**{**fields, **changed})  # type: ignore[arg-type]

    def roster(self, version: int = 1) -> Roster:
        return Roster(version, (self.entry(),))

    async def say(self, message: ToRouter) -> None:
        async with asyncio.timeout(5):
            await self._attached.wait()
        assert self._talk is not None
        await self._talk.write(encode(message))

    async def hear(self) -> ToWorker:
        async with asyncio.timeout(5):
            return await self.heard.get()

    def cut(self) -> None:
        """End the stream, as a worker that dies does."""
        self._cut.set()

    async def _attach(self, conversation: Conversation) -> None:
        hello = await conversation.read()
        assert isinstance(hello, Hello)
        self.hellos.append(hello)
        self._cut = cut = asyncio.Event()
        self._talk = conversation
        await conversation.write(encode(self.welcome))
        self._attached.set()
        reader = asyncio.create_task(self._read(conversation))
        await cut.wait()
        self._attached.clear()
        reader.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await reader

    async def _read(self, conversation: Conversation) -> None:
        while (message := await conversation.read()) is not None:
            if isinstance(message, KeepAlive):
                self.renewals += 1
            elif isinstance(message, RequestSnapshot):
                self.snapshot_requests += 1
            else:
                self.heard.put_nowait(message)
        self.cut()


async def until(condition: object, timeout_s: float = 5.0) -> None:
    """Wait until `condition()` is true; the loop goes on meanwhile."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # type: ignore[operator]  # noqa: ASYNC110
            await asyncio.sleep(0.005)
