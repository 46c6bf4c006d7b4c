"""A real worker subprocess for tests, and a collector that applies its token frames by index."""

import asyncio
import dataclasses
import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from penstock.workers.errors import RefusedError, WireError
from penstock.workers.protocol import WIRE_VERSION, EndReason, Failed, Granted, Hello, TokenFrame, ToRouter
from penstock.workers.rpc import AttachedStream, WorkerClient
from penstock.workers.settings import KVSettings, RunnerSettings, SchedulerSettings, TransferSettings, WorkerSettings

VOCAB = 5000
CLUSTER_KEY = "5e" * 32


def oracle_settings(worker_id: str = "w", **changed: Any) -> WorkerSettings:
    """A small oracle worker that ends with this process."""
    settings = WorkerSettings(
        worker_id,
        cluster_key=CLUSTER_KEY,
        parent_pid=os.getpid(),
        heartbeat_s=0.1,
        drain_s=5.0,
        scheduler=SchedulerSettings(max_num_batched_tokens=256, max_model_len=1024),
        kv=KVSettings(block_size=16, num_blocks=4096),
        transfer=TransferSettings(lease_s=2.0),
        runner=RunnerSettings(kind="oracle", oracle_vocab=VOCAB),
    )
    return dataclasses.replace(settings, **changed)


class WorkerProcess:
    """One worker; as a context manager it leaves no process behind."""

    def __init__(
        self,
        settings: WorkerSettings,
        environment: Mapping[str, str] | None = None,
        command: Sequence[str] = (sys.executable, "-m", "penstock.workers.process"),
    ) -> None:
        """`environment` changes this process's own; `command` runs a worker its own way."""
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, **(environment or {})},
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(settings.to_json() + "\n")
        self.process.stdin.close()
        self.facts = json.loads(self.process.stdout.readline() or "{}")

    @property
    def address(self) -> str:
        return str(self.facts["address"])

    def wait(self, timeout_s: float = 10.0) -> int:
        return self.process.wait(timeout_s)

    def __enter__(self) -> "WorkerProcess":
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)
        assert self.process.stdout is not None
        self.process.stdout.close()


class Attachment:
    """A router's end of one stream: reads in the background, and lets the test wait for what it needs."""

    def __init__(self, client: WorkerClient, stream: AttachedStream) -> None:
        self.client = client
        self.stream = stream
        self.tokens: dict[tuple[int, int], dict[int, int]] = defaultdict(dict)
        self.ends: dict[tuple[int, int], EndReason] = {}
        self.failed: dict[tuple[int, int], Failed] = {}
        self.granted: dict[tuple[int, int], Granted] = {}
        self.others: list[ToRouter] = []
        self.lost: Exception | None = None
        self._news = asyncio.Event()
        self._task = asyncio.create_task(self._read())

    @staticmethod
    async def open(address: str, router_id: str = "router", epoch: int = 1, lease_s: float = 30.0) -> "Attachment":
        client = WorkerClient(address, CLUSTER_KEY)
        return Attachment(client, await client.attach(Hello(WIRE_VERSION, router_id, epoch, lease_s)))

    def send(self, message: Any) -> bool:
        return self.stream.send(message)

    def text(self, slot: int, attempt: int = 1) -> list[int | None]:
        got = self.tokens[slot, attempt]
        return [got.get(index) for index in range(max(got, default=-1) + 1)]

    async def until(self, ready: Any, timeout_s: float = 20.0) -> None:
        """Wait until `ready()` is true."""
        async with asyncio.timeout(timeout_s):
            while not ready():
                self._news.clear()
                await self._news.wait()

    async def close(self) -> None:
        await self.stream.close()
        await asyncio.gather(self._task, return_exceptions=True)
        await self.client.close()

    async def _read(self) -> None:
        try:
            async for message in self.stream:
                self._take(message)
                self._news.set()
        except (RefusedError, WireError) as error:
            self.lost = error
        self._news.set()

    def _take(self, message: ToRouter) -> None:
        match message:
            case TokenFrame():
                at = 0
                rows = zip(message.slots, message.attempts, message.starts, message.counts, message.ends, strict=True)
                for slot, attempt, start, count, end in ((*map(int, row),) for row in rows):
                    for offset in range(count):
                        self.tokens[slot, attempt][start + offset] = int(message.tokens[at + offset])
                    at += count
                    if end:
                        self.ends[slot, attempt] = EndReason(end)
            case Failed(slot, attempt):
                self.failed[slot, attempt] = message
            case Granted(slot, attempt):
                self.granted[slot, attempt] = message
            case _:
                self.others.append(message)
