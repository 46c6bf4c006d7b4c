"""One engine with a real scheduler, the oracle and a transfer that moves only when told, on a clock the test turns."""

import itertools
import threading
import time
from collections.abc import Callable
from typing import Any

from fakes.late_device import LateDevice
from fakes.loopback_transfer import LoopbackFabric, LoopbackTransfer

from penstock.workers.engine import Engine, EngineParts
from penstock.workers.handover import GranterIdentity, HandOver
from penstock.workers.inbox import Attached
from penstock.workers.kv.banks import make_banks
from penstock.workers.kv.prefix_cache import chain_digests
from penstock.workers.kv.storage import KVStorage
from penstock.workers.kv_feed import KVEventFeed
from penstock.workers.oracle import OracleRunner, expected_tokens, oracle_layout
from penstock.workers.protocol import (
    EndReason,
    GenerateRequest,
    SamplingParams,
    TokenFrame,
    ToRouter,
)
from penstock.workers.scheduler.plan import StepPlan, StepResult
from penstock.workers.scheduler.scheduler import Scheduler
from penstock.workers.settings import KVSettings, RunnerSettings, SchedulerSettings

VOCAB = 1000
BLOCK = 4


class Told:
    """Reporter that keeps everything."""

    def __init__(self) -> None:
        self.messages: list[tuple[str, ToRouter]] = []
        self.cut_routers: list[str] = []

    def send(self, router_id: str, message: ToRouter) -> None:
        self.messages.append((router_id, message))

    def broadcast(self, message: ToRouter) -> None:
        self.messages.append(("*", message))

    def cut(self, router_id: str) -> None:
        self.cut_routers.append(router_id)

    def of(self, kind: type, router_id: str = "r") -> list[Any]:
        return [message for to, message in self.messages if to in (router_id, "*") and isinstance(message, kind)]

    def text(self, slot: int, attempt: int = 1, router_id: str = "r") -> tuple[list[int | None], EndReason]:
        """Tokens applied by index, and how the choice ended."""
        got: dict[int, int] = {}
        end = EndReason.NONE
        for frame in self.of(TokenFrame, router_id):
            at = 0
            for row, count in enumerate(frame.counts.tolist()):
                if (frame.slots[row], frame.attempts[row]) == (slot, attempt):
                    for offset in range(count):
                        got[int(frame.starts[row]) + offset] = int(frame.tokens[at + offset])
                    end = EndReason(max(end, int(frame.ends[row])))
                at += count
        return [got.get(index) for index in range(max(got, default=-1) + 1)], end


class Faulty:
    """A runner that raises when told to."""

    def __init__(self, inner: OracleRunner) -> None:
        self.inner = inner
        self.layout = inner.layout
        self.vocab_size = inner.vocab_size
        self.failures: list[Exception] = []

    def run(self, plan: StepPlan) -> StepResult:
        if self.failures:
            raise self.failures.pop()
        return self.inner.run(plan)


class Bench:
    """One engine on a clock that the test turns."""

    def __init__(
        self,
        fabric: LoopbackFabric,
        name: str = "w",
        num_blocks: int = 64,
        *,
        banks: int = 1,
        late: bool = False,
        **limits: Any,
    ) -> None:
        """`late`: on a device that is always a step behind, so that steps are planned ahead.

        `banks` share the blocks. `idle`: what idle moments find to do, the last first.
        """
        self.now = 100.0
        self.num_blocks = num_blocks
        kv = KVSettings(block_size=BLOCK, num_blocks=num_blocks)
        runner_settings = RunnerSettings(kind="oracle", oracle_vocab=VOCAB)
        layout = oracle_layout(runner_settings, kv)
        self.storage = KVStorage.create(num_blocks, layout.block_bytes)
        made = make_banks(banks, num_blocks // banks, self.storage.generations, prefix_caching=True)
        cache = made[0].cache
        self.told = Told()
        self.scheduler = Scheduler(SchedulerSettings(max_model_len=200 // banks, **limits), layout, *made)
        self.transfer = LoopbackTransfer(fabric, name, self.storage)
        self.runner = Faulty(OracleRunner(runner_settings, layout, self.storage.data))
        serial = itertools.count(1)
        identity = GranterIdentity(name, 1, "host", layout.compatibility, 10.0)
        self.handover = HandOver(self.transfer, identity, lambda: f"{name}{next(serial)}".encode().ljust(16))
        self.idle: list[Exception | bool] = []
        self.device = LateDevice(self.runner.run)
        parts = EngineParts(
            self.scheduler,
            self.runner,
            self.handover,
            KVEventFeed(cache, self.told),
            self.told,
            prepare=self._prepare,
            start=self.device.start if late else None,
        )
        self.awake = threading.Event()
        self.engine = Engine(parts, lambda: self.now, self.awake)
        self.engine.post("r", Attached(5.0))

    def post(self, message: Any, router_id: str = "r") -> None:
        assert self.engine.post(router_id, message)

    def step(self, times: int = 1) -> None:
        for _ in range(times):
            self.engine.step()
            self.scheduler.check_integrity()

    def until_idle(self, limit: int = 500) -> None:
        for _ in range(limit):
            if not self.engine.step():
                return
        raise AssertionError("never idle")

    def _prepare(self) -> bool:
        found = self.idle.pop() if self.idle else False
        if isinstance(found, Exception):
            raise found
        return found

    def run_until(self, ready: Callable[[], bool]) -> None:
        """On the engine's own thread, as in a worker."""
        running = threading.Thread(target=self.engine.run)
        running.start()
        give_up = time.monotonic() + 10
        while not ready() and time.monotonic() < give_up:
            time.sleep(0.01)
        self.engine.stop()
        running.join(10)
        assert ready()

    def all_free(self) -> bool:
        stats = self.scheduler.stats()
        return (stats.running, stats.waiting, stats.quarantined_blocks) == (
            0,
            0,
            0,
        ) and stats.free_blocks == self.num_blocks


def request(length: int = 10, max_tokens: int = 8, salt: int = 0, **sampling: Any) -> GenerateRequest:
    prompt = tuple((salt * 37 + index * 11) % VOCAB for index in range(length))
    root = b"\0" * 32
    return GenerateRequest(
        f"q{salt}",
        prompt,
        SamplingParams(max_tokens, **sampling),
        prefix_root=root,
        prefix_digests=chain_digests(root, prompt, BLOCK),
    )


def answer(asked: GenerateRequest) -> list[int]:
    return [*asked.emitted, *expected_tokens(asked.prompt, asked.sampling, VOCAB, emitted=asked.emitted)]
