"""Host time of one engine step without a model, at a steady number of running sequences: the parts, and the whole.

Times whole turns of the real step loop: requests come in, plan, commit, prefix-cache events, report, and the token
frames encoded to bytes as they leave for one router. Every step 2 sequences end and 2 are admitted, so that every cost
of a sequence's life appears in every step: admission, prefill chunk, decode, publishing of filled blocks, end, release.
Contexts are `--context` tokens long on average over a sequence's life. Two arrangements of the prompts:

- `cached`: a prompt begins with one of 16 documents, found in the prefix cache, and ends with 64 to 79 tokens of its
  own, which are computed beside the decodes under the default budget of 512 tokens;
- `computed`: nobody shares anything, and every prompt is computed whole in one step, so that hundreds of blocks are
  allocated, published, released and evicted in every step.

All requests are made and decoded before the clock starts; a worker's other threads do that. Prints one JSON object;
times in microseconds. `submit`, `plan`, `commit` are the scheduler's parts of a turn, timed in
a run of their own.

    python tests/benchmarks/step_host_time.py [--steps 1000] [--context 2000]
"""

import argparse
import gc
import json
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from provenance import provenance

from penstock.workers.engine import Engine, EngineParts
from penstock.workers.handover import GranterIdentity, HandOver
from penstock.workers.inbox import Attached
from penstock.workers.kv.banks import Bank
from penstock.workers.kv.block_pool import BlockPool
from penstock.workers.kv.layout import KVLayout
from penstock.workers.kv.prefix_cache import PrefixCache, chain_digests
from penstock.workers.kv_feed import KVEventFeed
from penstock.workers.outbox import Outbox
from penstock.workers.protocol import EndReason, Generate, GenerateRequest, SamplingParams, TokenFrame, ToRouter
from penstock.workers.scheduler.plan import StartStep, StepPlan, StepResult
from penstock.workers.scheduler.scheduler import Scheduler, SequenceKey, Work
from penstock.workers.settings import SchedulerSettings
from penstock.workers.transfer.port import TransferEvent
from penstock.workers.wire import decode_to_router, decode_to_worker, encode

_BLOCK = 16
_STARTS_PER_STEP = 2
_DOCUMENTS = 16
_LEAST_OWN = 64  # tokens of a prompt after its document
_ROOT = b"\0" * 32
_BUDGET = {"cached": 512, "computed": 8192}  # tokens of a step


class StubRunner:
    """Samples fixed tokens; costs next to nothing."""

    layout = KVLayout(num_layers=1, num_kv_heads=1, head_dim=1, block_size=_BLOCK, dtype="float32")
    vocab_size = 1 << 20

    def __init__(self) -> None:
        self._tokens = np.arange(100, 4196, dtype=np.int32)

    def run(self, plan: StepPlan) -> StepResult:
        return StepResult(self._tokens[: len(plan.sample_rows)])


class NoTransfer:
    """A transfer side on which nothing happens."""

    address = "nowhere:0"

    def poll(self) -> Sequence[TransferEvent]:
        return []


class OneRouter:
    """Reporter with a single stream, as the service keeps it; a test of the result counts rows and ends."""

    def __init__(self) -> None:
        self.outbox = Outbox(lambda: None)

    def send(self, router_id: str, message: ToRouter) -> None:
        self.outbox.push(message)

    def broadcast(self, message: ToRouter) -> None:
        self.outbox.push(message)

    def cut(self, router_id: str) -> None:
        raise SystemExit("the router's lease ended")


@dataclass(frozen=True)
class Load:
    """A steady state: `sequences` of them, so long that two end in every step."""

    arrangement: str
    sequences: int
    context: int
    steps: int

    @property
    def output(self) -> int:
        return self.sequences // _STARTS_PER_STEP

    @property
    def prompt(self) -> int:
        return self.context - self.output // 2

    @property
    def warm_up(self) -> int:
        return self.output + 50

    @property
    def facts(self) -> dict[str, object]:
        return {
            "arrangement": self.arrangement,
            "sequences": self.sequences,
            "steps": self.steps,
            "prompt_tokens": self.prompt,
            "output_tokens": self.output,
        }

    @property
    def documents(self) -> list[tuple[int, GenerateRequest]]:
        """Requests after which every document is in the cache."""
        if self.arrangement != "cached":
            return []
        first = 1 << 20
        return [(index, self.request(index, output=1)) for index in range(first, first + _DOCUMENTS)]

    def request(self, index: int, output: int) -> GenerateRequest:
        """A request with its digests as the ingress sends them, as it comes out of the wire."""
        own = self.prompt
        document: list[int] = []
        if self.arrangement == "cached":
            shared = (self.prompt - _LEAST_OWN) // _BLOCK * _BLOCK
            own -= shared
            document = np.random.default_rng(index % _DOCUMENTS).integers(5000, 30000, shared).tolist()
        tokens = (*document, *np.random.default_rng(1000 + index).integers(5000, 30000, own).tolist())
        sampling = SamplingParams(max_tokens=output, temperature=0.7, seed=index, stop_token_ids=(2,))
        digests = chain_digests(_ROOT, tokens, _BLOCK)
        sent = GenerateRequest(f"r{index}", tokens, sampling, prefix_root=_ROOT, prefix_digests=digests)
        read = decode_to_worker(encode(Generate(index, 0, sent)))
        assert isinstance(read, Generate)
        return read.request

    def requests(self, step: int) -> list[tuple[int, GenerateRequest]]:
        """The requests that come in before this step."""
        first = step * _STARTS_PER_STEP
        return [(index, self.request(index, self.output)) for index in range(first, first + _STARTS_PER_STEP)]

    def scheduler(self) -> tuple[Scheduler, PrefixCache]:
        """With room for all sequences and documents, and a prefix cache that has to evict."""
        layout = StubRunner.layout
        longest = self.prompt + self.output
        pool = BlockPool((self.sequences + _DOCUMENTS) * (layout.blocks_for(longest) + 1))
        settings = SchedulerSettings(
            max_num_seqs=self.sequences,
            max_num_batched_tokens=_BUDGET[self.arrangement],
            max_model_len=max(4096, longest),
        )
        cache = PrefixCache(pool)
        return Scheduler(settings, layout, Bank(pool, cache)), cache


@dataclass
class Timings:
    """Microseconds per measured step."""

    submit: list[float] = field(default_factory=list)
    plan: list[float] = field(default_factory=list)
    commit: list[float] = field(default_factory=list)

    def summary(self) -> dict[str, object]:
        return {name: _summary(values) for name, values in vars(self).items()}


def _summary(values: list[float]) -> dict[str, float]:
    return {
        "median_us": round(float(np.median(values)), 1),
        "mean_us": round(float(np.mean(values)), 1),
        "p99_us": round(float(np.percentile(values, 99)), 1),
    }


def measure_scheduler(load: Load) -> dict[str, object]:
    """Fill up to the steady state, then time `steps` steps of the scheduler alone."""
    scheduler, cache = load.scheduler()
    runner, timings = StubRunner(), Timings()
    rows, ends = [], []
    arrivals = [load.requests(step) for step in range(load.warm_up + load.steps)]
    for index, request in load.documents:
        scheduler.submit(SequenceKey("router", index, 0), Work.GENERATE, request, 0.0)
    while (plan := scheduler.plan(0.0)) is not None:
        scheduler.commit(plan, runner.run(plan), 0.0)
    scheduler.take_events()
    settle()
    for step, requests in enumerate(arrivals):
        begin = time.perf_counter()
        for index, request in requests:
            scheduler.submit(SequenceKey("router", index, 0), Work.GENERATE, request, begin)
        submitted = time.perf_counter()
        plan = scheduler.plan(submitted)
        planned = time.perf_counter()
        if plan is None:
            raise SystemExit("nothing to run")
        result = runner.run(plan)
        ran = time.perf_counter()
        outcome = scheduler.commit(plan, result, ran)
        committed = time.perf_counter()
        scheduler.take_events()
        cache.take_events()
        if step < load.warm_up:
            continue
        rows.append(len(plan.slots))
        ends.append(int(np.count_nonzero(outcome.ends)))
        timings.submit.append((submitted - begin) * 1e6)
        timings.plan.append((planned - submitted) * 1e6)
        timings.commit.append((committed - ran) * 1e6)
    scheduler.check_integrity()
    if set(rows) != {load.sequences} or set(ends) != {_STARTS_PER_STEP}:
        raise SystemExit(f"not steady: {set(rows)} rows, {set(ends)} ends per step")
    return {**load.facts, **timings.summary()}


def build_engine(
    load: Load, router: OneRouter, runner: StubRunner | None = None, start: StartStep | None = None
) -> Engine:
    """The real step loop around a stub runner and no transfer, with the load's documents in the cache."""
    scheduler, cache = load.scheduler()
    identity = GranterIdentity("w", 1, "host", StubRunner.layout.compatibility, 10.0)
    handover = HandOver(NoTransfer(), identity, lambda: b"\0" * 16)  # type: ignore[arg-type]
    parts = EngineParts(scheduler, runner or StubRunner(), handover, KVEventFeed(cache, router), router, start=start)
    engine = Engine(parts, time.monotonic, threading.Event())
    engine.post("router", Attached(3600.0))
    for index, request in load.documents:
        engine.post("router", Generate(index, 0, request))
    while engine.step():
        router.outbox.take()
    return engine


def measure_engine(load: Load) -> dict[str, object]:
    """Time `steps` turns of the loop in the steady state; wall clock, and this thread's processor time."""
    router = OneRouter()
    engine = build_engine(load, router)
    wall, cpu, size = [], [], []
    arrivals = [load.requests(step) for step in range(load.warm_up + load.steps)]
    settle()
    for step, requests in enumerate(arrivals):
        begin, begin_cpu = time.perf_counter(), time.thread_time()
        for index, request in requests:
            engine.post("router", Generate(index, 0, request))
        engine.step()
        sent = router.outbox.take()
        used, passed = time.thread_time() - begin_cpu, time.perf_counter() - begin
        if step < load.warm_up:
            continue
        wall.append(passed * 1e6)
        cpu.append(used * 1e6)
        size.append(sum(map(len, sent)))
        frame = next(m for m in map(decode_to_router, sent) if isinstance(m, TokenFrame))
        if len(frame.slots) != load.sequences or np.count_nonzero(frame.ends != EndReason.NONE) != _STARTS_PER_STEP:
            raise SystemExit("not steady")
    return {
        **load.facts,
        "wall": _summary(wall),
        "processor": _summary(cpu),
        "bytes_per_step": round(float(np.mean(size))),
    }


def settle() -> None:
    """What a worker does before it serves."""
    gc.collect()
    gc.freeze()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--context", type=int, default=2000)
    arguments = parser.parse_args()
    loads = [
        Load(arrangement, sequences, arguments.context, arguments.steps)
        for arrangement in _BUDGET
        for sequences in (64, 256)
    ]
    engine = [measure_engine(load) for load in loads]
    scheduler = [measure_scheduler(load) for load in loads]
    print(
        json.dumps(
            {"what": "host time of one step", **provenance(), "engine": engine, "scheduler": scheduler}, indent=2
        )
    )


if __name__ == "__main__":
    main()
