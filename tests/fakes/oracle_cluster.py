"""Oracle workers in real processes, streams over them that check their own text, and the count of what was lost.

The fault tests and the hand-over benchmark use it. A text is right when it equals `expected_tokens`: one lost,
doubled, stale or foreign KV block changes every later token.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from penstock.cluster.ledger.recorder import Recorded, Recorder
from penstock.cluster.local import LocalCluster
from penstock.router.settings import AdmissionSettings
from penstock.workers.errors import RefusedError
from penstock.workers.kv.prefix_cache import chain_digests
from penstock.workers.oracle import expected_tokens
from penstock.workers.protocol import EndReason, GenerateRequest, Role, SamplingParams, Tokens
from penstock.workers.settings import (
    KVSettings,
    LedgerSettings,
    RunnerSettings,
    SchedulerSettings,
    TransferSettings,
    WorkerSettings,
)

VOCAB = 32000
KEY = "ab" * 32
ROOT = b"\1" * 32
PATIENT = AdmissionSettings(ttft_target_s=120.0)  # on a busy machine nobody is to be refused for being late


@dataclass(frozen=True)
class Pace:
    """Shape of the oracle workers of one test."""

    step_s: float = 0.002
    token_s: float = 0.0
    num_blocks: int = 4096
    block_size: int = 4
    max_num_seqs: int = 256
    chunk: int = 256
    reserve_tokens: int = 32
    transport: str = "auto"
    lease_s: float = 10.0
    prefix_caching: bool = True
    digest: str = "auto"
    context: int = 2048


def oracle_worker(role: Role, index: int, pace: Pace) -> WorkerSettings:
    return WorkerSettings(
        worker_id=f"{role.value}-{index}",
        role=role,
        cluster_key=KEY,
        scheduler=SchedulerSettings(
            max_num_seqs=pace.max_num_seqs,
            max_num_batched_tokens=pace.chunk,
            max_model_len=pace.context,
            reserve_tokens=pace.reserve_tokens,
        ),
        kv=KVSettings(block_size=pace.block_size, num_blocks=pace.num_blocks, prefix_caching=pace.prefix_caching),
        transfer=TransferSettings(transport=pace.transport, lease_s=pace.lease_s, digest=pace.digest),
        ledger=LedgerSettings(share=1.0),
        runner=RunnerSettings(
            kind="oracle", oracle_vocab=VOCAB, oracle_step_s=pace.step_s, oracle_token_s=pace.token_s
        ),
    )


def oracle_workers(prefill: int, decode: int, pace: Pace) -> list[WorkerSettings]:
    return [oracle_worker(Role.PREFILL, i, pace) for i in range(prefill)] + [
        oracle_worker(Role.DECODE, i, pace) for i in range(decode)
    ]


def oracle_request(number: int, prompt_tokens: int, output_tokens: int, pace: Pace, seed: int = 0) -> GenerateRequest:
    rng = random.Random(f"{seed}/{number}")
    prompt = tuple(rng.randrange(VOCAB) for _ in range(prompt_tokens))
    return GenerateRequest(
        request_id=f"r{number}",
        prompt=prompt,
        sampling=SamplingParams(max_tokens=output_tokens, temperature=float(number % 2), seed=number * 7919 + 1),
        queue_timeout_s=120.0,  # as patient as PATIENT
        prefix_root=ROOT,
        prefix_digests=chain_digests(ROOT, prompt, pace.block_size),
    )


@dataclass
class Tally:
    """What became of the streams of one test."""

    completed: int = 0
    wrong: list[str] = field(default_factory=list)
    failed: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    begun: int = 0  # streams with at least one token
    longest_gap_s: float = 0.0

    def line(self) -> str:
        return (
            f"completed {self.completed}, failed {dict(self.failed)}, wrong {len(self.wrong)}, "
            f"tokens {self.tokens}, longest gap {self.longest_gap_s:.2f} s"
        )


Expected = Callable[[GenerateRequest], Tokens]


def oracle_says(request: GenerateRequest) -> Tokens:
    return expected_tokens(request.prompt, request.sampling, VOCAB)


class Streams:
    """Runs requests against a generator and checks every token as it comes."""

    def __init__(self, cluster: LocalCluster, expected: Expected | None = None) -> None:
        """`expected`: what each request must say, where the workers are no oracles."""
        self.tally = Tally()
        self._expected = expected or oracle_says
        self.progress = asyncio.Event()  # set whenever a token arrives anywhere
        self.live: dict[int, Recorded] = {}
        self._cluster = cluster
        self._numbers = itertools.count()

    @cached_property
    def recorder(self) -> Recorder:
        """Made with the first stream: the cluster has to run by then, not before."""
        return Recorder(self._cluster.generator)

    async def run(self, requests: Sequence[GenerateRequest]) -> Tally:
        await asyncio.gather(*(self.run_one(next(self._numbers), request) for request in requests))
        return self.tally

    async def run_one(self, number: int, request: GenerateRequest) -> None:
        """One stream to its end; `number` names it among the live ones."""
        generation = self.recorder.submit(request)
        self.live[number] = generation
        wanted = self._expected(request)
        got: list[int] = []
        end = EndReason.NONE
        last = time.monotonic()
        try:
            async for delta in generation:
                now = time.monotonic()
                self.tally.begun += not got
                if got:
                    self.tally.longest_gap_s = max(self.tally.longest_gap_s, now - last)
                last = now
                got += delta.tokens
                end = delta.end
                self.tally.tokens += len(delta.tokens)
                self.progress.set()
        except RefusedError as error:
            self.tally.failed[error.code.value] += 1
            if tuple(got) != wanted[: len(got)]:
                self.tally.wrong.append(request.request_id)
            return
        finally:
            del self.live[number]
        if tuple(got) == wanted and end is EndReason.LENGTH:
            self.tally.completed += 1
        else:
            self.tally.wrong.append(request.request_id)

    async def until_tokens(self, count: int, timeout_s: float = 30.0) -> None:
        """Returns once `count` tokens have arrived over all streams."""
        async with asyncio.timeout(timeout_s):
            while self.tally.tokens < count:
                self.progress.clear()
                await self.progress.wait()


async def wait_running(cluster: LocalCluster, worker_id: str, least: int = 1, timeout_s: float = 20.0) -> int:
    """Sequences (reserved ones included) on the worker, once there are at least so many."""
    async with asyncio.timeout(timeout_s):
        while True:
            for status in cluster.fleet.workers():
                if status.id == worker_id and status.running >= least:
                    return status.running
            await asyncio.sleep(0.005)


async def leaked_blocks(cluster: LocalCluster, timeout_s: float = 15.0) -> int:
    """Blocks not free once all workers are ready and idle; waits that long for them to become so."""
    deadline = time.monotonic() + timeout_s
    while True:
        states = cluster.fleet.workers()
        idle = all(
            s.state == "ready" and s.age_s is not None and s.running + s.waiting + s.transfers == 0 for s in states
        )
        leaked = sum(s.kv_blocks - s.kv_free_blocks for s in states)
        if (idle and leaked == 0) or time.monotonic() > deadline:
            return leaked if idle else max(leaked, 1)
        await asyncio.sleep(0.05)
