"""Host time of one engine step without a model, at a steady number of running sequences: the parts, and the whole.

`scheduler` times plan and commit alone; `engine` times whole turns of the real step loop (requests come in, step,
commit, prefix-cache events, report), with the token frames encoded to bytes as they leave for one router. Every step
2 sequences end and 2 are admitted (each with its own prompt), so that over its life every cost appears: admission,
prefill chunk, decode, publishing of filled blocks, end, release. Prints one JSON object; times in microseconds.

    python tests/benchmarks/step_host_time.py [--steps 2000] [--prompt 100]
"""

import argparse
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
from penstock.workers.kv.block_pool import BlockPool
from penstock.workers.kv.layout import KVLayout
from penstock.workers.kv.prefix_cache import PrefixCache, chain_digests
from penstock.workers.kv_feed import KVEventFeed
from penstock.workers.outbox import Outbox
from penstock.workers.protocol import EndReason, Generate, GenerateRequest, SamplingParams, TokenFrame, ToRouter
from penstock.workers.scheduler.plan import StepPlan, StepResult
from penstock.workers.scheduler.scheduler import Scheduler, SequenceKey, Work
from penstock.workers.settings import SchedulerSettings
from penstock.workers.transfer.port import TransferEvent
from penstock.workers.wire import decode_to_router

_BLOCK = 16
_STARTS_PER_STEP = 2
_ROOT = b"\0" * 32


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


@dataclass
class Timings:
    """Microseconds per measured step."""

    submit: list[float] = field(default_factory=list)
    plan: list[float] = field(default_factory=list)
    commit: list[float] = field(default_factory=list)
    plan_commit: list[float] = field(default_factory=list)

    def summary(self) -> dict[str, dict[str, float]]:
        return {
            name: {"median_us": round(float(np.median(v)), 1), "p99_us": round(float(np.percentile(v, 99)), 1)}
            for name, v in vars(self).items()
        }


def build_scheduler(sequences: int, max_len: int) -> tuple[Scheduler, PrefixCache]:
    """A scheduler with room for `sequences` and a prefix cache that has to evict."""
    layout = StubRunner.layout
    pool = BlockPool(sequences * (layout.blocks_for(max_len) + 1))
    settings = SchedulerSettings(max_num_seqs=sequences, max_num_batched_tokens=512, max_model_len=max(4096, max_len))
    cache = PrefixCache(pool)
    return Scheduler(settings, layout, pool, cache), cache


def make_request(index: int, prompt: int, output: int) -> GenerateRequest:
    """A request whose prompt nobody shares, with its digests as the ingress sends them."""
    tokens = tuple(np.random.default_rng(index).integers(5000, 30000, prompt).tolist())
    sampling = SamplingParams(max_tokens=output, temperature=0.7, seed=index, stop_token_ids=(2,))
    digests = chain_digests(_ROOT, tokens, _BLOCK)
    return GenerateRequest(f"r{index}", tokens, sampling, prefix_root=_ROOT, prefix_digests=digests)


def measure(sequences: int, steps: int, prompt: int) -> dict[str, object]:
    """Fill up to the steady state, then time `steps` steps."""
    output = sequences // _STARTS_PER_STEP
    scheduler, _ = build_scheduler(sequences, prompt + output)
    runner, timings = StubRunner(), Timings()
    warm_up = output + 50
    rows, ends = [], []
    for step in range(warm_up + steps):
        requests = [make_request(step * _STARTS_PER_STEP + i, prompt, output) for i in range(_STARTS_PER_STEP)]
        begin = time.perf_counter()
        for i, request in enumerate(requests):
            key = SequenceKey("router", step * _STARTS_PER_STEP + i, 0)
            scheduler.submit(key, Work.GENERATE, request, begin)
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
        if step < warm_up:
            continue
        rows.append(len(plan.slots))
        ends.append(int(np.count_nonzero(outcome.ends)))
        timings.submit.append((submitted - begin) * 1e6)
        timings.plan.append((planned - submitted) * 1e6)
        timings.commit.append((committed - ran) * 1e6)
        timings.plan_commit.append((planned - submitted + committed - ran) * 1e6)
    scheduler.check_integrity()
    if set(rows) != {sequences} or set(ends) != {_STARTS_PER_STEP}:
        raise SystemExit(f"not steady: {set(rows)} rows, {set(ends)} ends per step")
    return {"sequences": sequences, "steps": steps, "prompt_tokens": prompt, **timings.summary()}


def build_engine(sequences: int, max_len: int, router: OneRouter) -> Engine:
    """The real step loop around a stub runner and no transfer."""
    scheduler, cache = build_scheduler(sequences, max_len)
    identity = GranterIdentity("w", 1, "host", StubRunner.layout.compatibility, 10.0)
    handover = HandOver(NoTransfer(), identity, lambda: b"\0" * 16)  # type: ignore[arg-type]
    parts = EngineParts(scheduler, StubRunner(), handover, KVEventFeed(cache, router), router)
    engine = Engine(parts, time.monotonic, threading.Event())
    engine.post("router", Attached(3600.0))
    return engine


def measure_engine(sequences: int, steps: int, prompt: int) -> dict[str, object]:
    """Time `steps` turns of the loop in the steady state; wall clock, and this thread's processor time."""
    output = sequences // _STARTS_PER_STEP
    router = OneRouter()
    engine = build_engine(sequences, prompt + output, router)
    wall, cpu, size = [], [], []
    for step in range(output + 50 + steps):
        requests = [make_request(step * _STARTS_PER_STEP + i, prompt, output) for i in range(_STARTS_PER_STEP)]
        begin, begin_cpu = time.perf_counter(), time.thread_time()
        for i, request in enumerate(requests):
            engine.post("router", Generate(step * _STARTS_PER_STEP + i, 0, request))
        engine.step()
        sent = router.outbox.take()
        used, passed = time.thread_time() - begin_cpu, time.perf_counter() - begin
        if step < output + 50:
            continue
        wall.append(passed * 1e6)
        cpu.append(used * 1e6)
        size.append(sum(map(len, sent)))
        frame = next(m for m in map(decode_to_router, sent) if isinstance(m, TokenFrame))
        if len(frame.slots) != sequences or np.count_nonzero(frame.ends != EndReason.NONE) != _STARTS_PER_STEP:
            raise SystemExit("not steady")
    return {
        "sequences": sequences,
        "steps": steps,
        "prompt_tokens": prompt,
        "wall_median_us": round(float(np.median(wall)), 1),
        "wall_p99_us": round(float(np.percentile(wall, 99)), 1),
        "cpu_median_us": round(float(np.median(cpu)), 1),
        "bytes_per_step": round(float(np.mean(size))),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--prompt", type=int, default=100)
    arguments = parser.parse_args()
    sizes, steps, prompt = (64, 256), arguments.steps, arguments.prompt
    scheduler = [measure(sequences, steps, prompt) for sequences in sizes]
    engine = [measure_engine(sequences, steps, prompt) for sequences in sizes]
    print(
        json.dumps(
            {"what": "host time of one step", **provenance(), "scheduler": scheduler, "engine": engine}, indent=2
        )
    )


if __name__ == "__main__":
    main()
