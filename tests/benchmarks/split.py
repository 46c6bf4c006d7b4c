"""Throughput of a split: a prefill and a decode worker, one core each, beside one mixed worker on both cores.

    python tests/benchmarks/split.py --model DIR [--input 256] [--output 96] [--json FILE]

Real worker processes, gRPC, KV hand-over through shared memory and the real router, without Ray and HTTP. The same
requests go to both in turns, in a closed loop of `--concurrency`; a run counts the requests that end within
`--seconds` after everything is warm. `p` is the share of prefill in the model's work, measured in the same run: one
core alone computes prompts to their first token, then the rest of the same texts over cached prompts. The most that a
split of one core each can reach of two ideal cores is 1 / (2 max(p, 1 - p)); the bar is `--bar` of that, relative to
the mixed worker. CPU seconds of the workers, of the driver, which both sides pay, and of everything else on the
machine (others: what disturbed the runs) are in the result.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import itertools
import json
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.provenance import provenance
from fakes.in_process import InProcessWorker, load_runner

from penstock.cluster.config import ClusterIdentity, load_config, worker_settings
from penstock.cluster.local import LocalCluster
from penstock.router.settings import RouterSettings
from penstock.workers.cores import take_cores
from penstock.workers.protocol import EndReason, GenerateRequest, Role, SamplingParams, Tokens
from penstock.workers.settings import SchedulerSettings, WorkerSettings

CORES = tuple(sorted(os.sched_getaffinity(0)))[:2]
TICK_S = 1 / os.sysconf("SC_CLK_TCK")


class Load:
    """Requests in a closed loop; every one has a new prompt."""

    def __init__(self, args: argparse.Namespace, vocab: int) -> None:
        self._args = args
        self._rng = random.Random(0)
        self._vocab = vocab
        self._serial = 0

    def prompt(self) -> Tokens:
        return tuple(self._rng.randrange(self._vocab) for _ in range(self._args.input))

    def request(self) -> GenerateRequest:
        self._serial += 1
        return GenerateRequest(f"r{self._serial}", self.prompt(), SamplingParams(max_tokens=self._args.output))

    async def run(self, cluster: LocalCluster, seconds: float, ramp_s: float) -> tuple[int, float]:
        """Output tokens that came within `seconds`, and the seconds it really was.

        Clients begin one after the other within `ramp_s`: all at once they would go through the phases in waves.
        """
        tokens, stop = 0, False

        async def client(delay_s: float) -> None:
            nonlocal tokens
            await asyncio.sleep(delay_s)
            while not stop:
                end = EndReason.NONE
                async for delta in cluster.generator.submit(self.request()):
                    tokens += len(delta.tokens)
                    end = delta.end
                if end is not EndReason.LENGTH and not stop:
                    raise SystemExit(f"a request ended by {end.name}")

        count = self._args.concurrency
        clients = [asyncio.ensure_future(client(ramp_s * number / count)) for number in range(count)]
        await asyncio.sleep(ramp_s + self._args.warm_s)
        tokens, began = 0, time.perf_counter()
        await asyncio.sleep(seconds)
        counted, took = tokens, time.perf_counter() - began
        stop = True
        for each in clients:
            each.cancel()
        results = await asyncio.gather(*clients, return_exceptions=True)
        for result in results:
            if isinstance(result, Exception):
                raise result
        return counted, took


def cpu_seconds(pid: int) -> float:
    """What one process has used so far, all its threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * TICK_S


def machine_seconds() -> float:
    """Core seconds that this machine has worked so far for anybody, its own host included (steal)."""
    user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:9])
    return (user + nice + system + irq + softirq + steal) * TICK_S


class Side:
    """One of the two clusters."""

    def __init__(self, workers: list[WorkerSettings], args: argparse.Namespace, router: RouterSettings) -> None:
        log = Path(tempfile.gettempdir()) / f"penstock-split-{os.getpid()}.log"
        self.cluster = LocalCluster(workers, router, log_file=log, restart=False)
        self._ids = [worker.worker_id for worker in workers]
        self._seconds = args.seconds
        self.forget()

    def forget(self) -> None:
        """What was measured so far was for warming up."""
        self.rates: list[float] = []
        self.cpu_s: dict[str, float] = dict.fromkeys([*self._ids, "driver", "others"], 0.0)
        self.wall_s = 0.0

    async def measure(self, load: Load, ramp_s: float) -> None:
        before, began = self._cpu(), time.perf_counter()
        tokens, took = await load.run(self.cluster, self._seconds, ramp_s)
        self.wall_s += time.perf_counter() - began
        self.rates.append(tokens / took)
        for name, seconds in self._cpu().items():
            self.cpu_s[name] += seconds - before[name]

    def result(self, alone_s: float, output: int) -> dict[str, object]:
        rate = statistics.median(self.rates)
        return {
            "output_tok_s": round(rate, 1),
            "runs": [round(rate, 1) for rate in self.rates],
            "of_two_ideal_cores": round(rate / output * alone_s / 2, 3),
            "wall_s": round(self.wall_s, 1),
            "cpu_s": {name: round(seconds, 2) for name, seconds in self.cpu_s.items()},
        }

    def _cpu(self) -> dict[str, float]:
        found = {name: cpu_seconds(self.cluster.process(name).pids[0]) for name in self._ids}
        found["driver"] = cpu_seconds(os.getpid())
        return {**found, "others": machine_seconds() - sum(found.values())}


def phases(args: argparse.Namespace, vocab: int) -> dict[str, float]:
    """Seconds of one core per request: to the first token, and from there on with `concurrency` sequences."""
    count = args.concurrency
    longest = args.input + args.output
    limits = SchedulerSettings(
        max_num_seqs=count, max_num_batched_tokens=512, max_model_len=longest, reserve_tokens=args.output
    )
    runner = load_runner(
        args.model, dtype="auto", threads=1, max_num_seqs=count, max_num_batched_tokens=512, max_model_len=longest
    )
    blocks = 2 * count * -(-longest // runner.layout.block_size) + 64
    rng = random.Random(1)
    found: list[tuple[float, float]] = []
    for _ in range(args.phase_repeats + 1):
        with InProcessWorker(runner, num_blocks=blocks, scheduler=limits) as worker:
            prompts: list[Tokens] = [tuple(rng.randrange(vocab) for _ in range(args.input)) for _ in range(count)]
            times = [time.perf_counter()]
            for output in (1, 1, args.output):
                worker.greedy(prompts, output)
                times.append(time.perf_counter())
        cold, cached, rest = (after - before for before, after in itertools.pairwise(times))
        found.append((cold / count, (rest - cached) / count))
    prefill, decode = (statistics.median(values) for values in zip(*found[1:], strict=True))
    return {"prefill_s": prefill, "decode_s": decode, "p": prefill / (prefill + decode)}


async def compare(args: argparse.Namespace, vocab: int, alone: dict[str, float]) -> dict[str, Any]:
    config = load_config(
        values={
            "runner.model_dir": str(args.model),
            "front.skip_tokenizer_init": True,
            "scheduler.max_model_len": args.input + args.output,
            "scheduler.max_num_seqs": args.max_num_seqs,
            "kv.memory_bytes": args.kv_memory,
            "kv.prefix_caching": False,
            "transfer.transport": args.transport,
            "router.placement.local_prefill_tokens": None if args.local_prefill else 0,
        },
        environment={},
    )
    identity = ClusterIdentity("bench", "cd" * 32)

    def told(role: Role, cpus: tuple[int, ...]) -> WorkerSettings:
        settings = worker_settings(config, role, 0, identity)
        return dataclasses.replace(settings, runner=dataclasses.replace(settings.runner, cpus=cpus, threads=len(cpus)))

    split = Side([told(Role.PREFILL, CORES[:1]), told(Role.DECODE, CORES[1:])], args, config.router)
    mixed = Side([told(Role.MIXED, CORES)], args, config.router)
    load, ramp_s = Load(args, vocab), args.concurrency * max(alone["prefill_s"], alone["decode_s"])
    async with split.cluster, mixed.cluster:
        for side in (split, mixed):
            await side.measure(load, ramp_s)
            side.forget()
        for _ in range(args.repeats):
            for side in (mixed, split):
                await side.measure(load, ramp_s)
    seconds = alone["prefill_s"] + alone["decode_s"]
    return {name: side.result(seconds, args.output) for name, side in (("split", split), ("mixed", mixed))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--input", type=int, default=256)
    parser.add_argument("--output", type=int, default=96)
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--kv-memory", type=int, default=1 << 30, help="bytes of each worker's pool")
    parser.add_argument("--transport", default="shared_memory", choices=["shared_memory", "tcp"])
    parser.add_argument("--local-prefill", action="store_true", help="the router may prefill at the decode worker")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each run, after it is warm")
    parser.add_argument("--warm-s", type=float, default=3.0, help="from the last client's start")
    parser.add_argument("--phase-repeats", type=int, default=2)
    parser.add_argument("--bar", type=float, default=0.9)
    parser.add_argument("--json", type=Path, help="write the result there too")
    args = parser.parse_args()
    if len(CORES) < 2:
        raise SystemExit("two cores are needed")
    vocab = int(json.loads((args.model / "config.json").read_text())["vocab_size"])
    before = os.sched_getaffinity(0)
    take_cores(CORES[:1])
    alone = phases(args, vocab)
    for thread in Path("/proc/self/task").iterdir():
        os.sched_setaffinity(int(thread.name), before)
    rates = asyncio.run(compare(args, vocab, alone))
    p = alone["p"]
    limit = 1 / (2 * max(p, 1 - p))
    ratio = rates["split"]["output_tok_s"] / rates["mixed"]["output_tok_s"]
    shape = {key: value for key, value in vars(args).items() if key not in ("model", "json", "bar")}
    result = {
        "what": "split of one core each beside one mixed worker on both",
        **provenance(),
        "model": args.model.name,
        **shape,
        "alone_on_one_core": {key: round(value, 5) for key, value in alone.items()},
        "limit": round(limit, 3),
        "bar": round(args.bar * limit, 3),
        "split_over_mixed": round(ratio, 3),
        "reached_of_limit": round(ratio / limit, 3),
        **rates,
    }
    text = json.dumps(result, indent=1)
    print(text)
    if args.json:
        args.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
