"""The price of a hand-over: the gap between a request's first token (prefill worker) and its second (decode worker).

    python tests/benchmarks/handover.py --model DIR [--transport shared_memory] [--json FILE]

One prefill and one decode worker, one thread each, both kept busy by background requests in a closed loop. Probes of
1,000 prompt tokens go one at a time; of each, the gap between its first two tokens minus its own median decode step
(the gaps that follow) is one sample. The gap holds the last chunk's KV on its way, its check, and the rest of the
decode step that is under way when it arrives.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import itertools

from benchmarks.provenance import provenance

from penstock.cluster.config import ClusterIdentity, load_config, worker_settings
from penstock.cluster.local import LocalCluster
from penstock.workers.protocol import GenerateRequest, Role, SamplingParams


async def token_times(cluster: LocalCluster, name: str, prompt: tuple[int, ...], output: int) -> list[float]:
    """Arrival of every token; tokens of one delta share a time."""
    times: list[float] = []
    async for delta in cluster.generator.submit(GenerateRequest(name, prompt, SamplingParams(max_tokens=output))):
        times += [time.perf_counter()] * len(delta.tokens)
    return times


async def measure(args: argparse.Namespace, vocab: int) -> dict[str, object]:
    config = load_config(
        values={
            "runner.model_dir": str(args.model),
            "runner.threads": 1,
            "front.skip_tokenizer_init": True,
            "scheduler.max_model_len": args.input + 256,
            "kv.memory_bytes": 512 << 20,
            "transfer.transport": args.transport,
            "router.placement.local_prefill_tokens": 0,
        },
        environment={},
    )
    identity = ClusterIdentity("bench", "cd" * 32)
    workers = [worker_settings(config, role, 0, identity) for role in (Role.PREFILL, Role.DECODE)]
    rng = random.Random(0)

    def prompt(length: int) -> tuple[int, ...]:
        return tuple(rng.randrange(vocab) for _ in range(length))

    excess: list[float] = []
    steps: list[float] = []
    async with LocalCluster(
        workers, config.router, log_file=Path(tempfile.gettempdir()) / "penstock-handover.log"
    ) as cluster:

        async def background(number: int) -> None:
            while True:
                await token_times(
                    cluster, f"background-{number}", prompt(args.background_input), args.background_output
                )

        load = [asyncio.ensure_future(background(number)) for number in range(args.background)]
        for probe in range(-3, args.probes):
            times = await token_times(cluster, f"probe-{probe}", prompt(args.input), 24)
            gaps = [after - before for before, after in itertools.pairwise(times)]
            step = statistics.median(gaps[1:])
            if probe >= 0:
                steps.append(1000 * step)
                excess.append(1000 * (gaps[0] - step))
        for task in load:
            task.cancel()
        await asyncio.gather(*load, return_exceptions=True)
    quarters = statistics.quantiles(excess, n=4)
    return {
        "probes": args.probes,
        "decode_step_ms": statistics.median(steps),
        "handover_ms": statistics.median(excess),
        "handover_quartiles_ms": [quarters[0], quarters[2]],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--transport", default="shared_memory", choices=["shared_memory", "tcp"])
    parser.add_argument("--input", type=int, default=1000)
    parser.add_argument("--probes", type=int, default=30)
    parser.add_argument("--background", type=int, default=4, help="background requests under way at once")
    parser.add_argument("--background-input", type=int, default=128)
    parser.add_argument("--background-output", type=int, default=48)
    parser.add_argument("--json", type=Path, help="write the result there too")
    args = parser.parse_args()
    vocab = int(json.loads((args.model / "config.json").read_text())["vocab_size"])
    shape = {key: value for key, value in vars(args).items() if key not in ("model", "json")}
    result = {
        "what": "hand-over",
        **provenance(),
        "model": args.model.name,
        **shape,
        **asyncio.run(measure(args, vocab)),
    }
    text = json.dumps(result, indent=1)
    print(text)
    if args.json:
        args.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
