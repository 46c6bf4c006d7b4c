"""Turns of conversations that do not fit into the KV pool: time to the first token with and without tiers below it.

    python tests/benchmarks/kv_tiers.py --model DIR [--conversations 12 --turns 4 --pool-conversations 3]

One mixed worker, one request at a time, the conversations in turn, so that each has been evicted when it comes back:
without tiers (as a peer would compute it), with all of it in host memory, and with most of it on disk. Turn 1 finds
nothing anywhere and is left out of the medians. The limit is a pool in which everything fits.
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

from benchmarks.provenance import provenance

from penstock.cluster.config import ClusterIdentity, load_config, worker_settings
from penstock.cluster.local import LocalCluster
from penstock.workers.kv.prefix_cache import chain_digests
from penstock.workers.protocol import GenerateRequest, Role, SamplingParams

BLOCK, ROOT = 16, b"\3" * 32


async def replay(args: argparse.Namespace, vocab: int, kv: dict[str, object]) -> dict[str, object]:
    """Medians over all turns but the first ones, and the shares of prompt tokens that were found."""
    longest = args.turns * (args.input + args.output)
    values: dict[str, object] = {
        "runner.model_dir": str(args.model),
        "runner.threads": 1,
        "front.skip_tokenizer_init": True,
        "scheduler.max_model_len": longest,
        "kv.block_size": BLOCK,
        **kv,
    }
    config = load_config(values=values, environment={})
    rng = random.Random(0)
    histories: list[list[int]] = [[] for _ in range(args.conversations)]
    waits: list[float] = []
    found = asked = 0
    log = Path(tempfile.gettempdir()) / "penstock-kv-tiers.log"
    worker = worker_settings(config, Role.MIXED, 0, ClusterIdentity("bench", "cd" * 32))
    async with LocalCluster([worker], config.router, log_file=log) as cluster:
        for turn in range(args.turns):
            for number, history in enumerate(histories):
                history += [rng.randrange(vocab) for _ in range(args.input)]
                digests = chain_digests(ROOT, history, BLOCK)
                sampling = SamplingParams(max_tokens=args.output)
                request = GenerateRequest(
                    f"{turn}-{number}", tuple(history), sampling, prefix_root=ROOT, prefix_digests=digests
                )
                generation = cluster.generator.submit(request)
                began, first = time.perf_counter(), 0.0
                length = len(history)
                async for delta in generation:
                    first = first or time.perf_counter()
                    history += delta.tokens
                if turn:
                    waits.append(1000 * (first - began))
                    found += generation.cached_tokens
                    asked += length
        await asyncio.sleep(1.0)  # the next heartbeat
        totals = next(iter(cluster.fleet.workers())).totals.tiers
    return {
        "ttft_ms_median": round(statistics.median(waits), 2),
        "ttft_ms_p95": round(statistics.quantiles(waits, n=20)[-1], 2),
        "found": round(found / asked, 4),
        "blocks_from_host": totals.host.hits,
        "blocks_from_disk": totals.disk.hits,
        "loads_given_up": totals.slow,
    }


async def measure(args: argparse.Namespace, vocab: int) -> dict[str, object]:
    longest = args.turns * (args.input + args.output)
    blocks = args.pool_conversations * -(-longest // BLOCK) + 1
    everything = args.conversations * -(-longest // BLOCK) + 1
    tiered: dict[str, object] = {"kv.num_blocks": blocks, "kv.host_bytes": args.host_bytes}
    results: dict[str, list[dict[str, object]]] = {}
    for _ in range(args.rounds):
        with tempfile.TemporaryDirectory() as folder:
            disk = {"kv.disk_path": folder, "kv.disk_bytes": 8 << 30, "kv.host_bytes": args.host_bytes // 16}
            ways: dict[str, dict[str, object]] = {
                "no tiers": {"kv.num_blocks": blocks},
                "host": tiered,
                "disk": {**tiered, **disk},
                "everything fits": {"kv.num_blocks": everything},
            }
            for name, kv in ways.items():
                results.setdefault(name, []).append(await replay(args, vocab, kv))
    best = {name: min(rounds, key=lambda each: float(str(each["ttft_ms_median"]))) for name, rounds in results.items()}
    return {"pool_blocks": blocks, "working_set_blocks": everything, "ways": best}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--conversations", type=int, default=12)
    parser.add_argument("--pool-conversations", type=int, default=3, help="so many fit into the pool")
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--input", type=int, default=200, help="new tokens of a turn")
    parser.add_argument("--output", type=int, default=24)
    parser.add_argument("--host-bytes", type=int, default=1 << 30)
    parser.add_argument("--rounds", type=int, default=2, help="the best of so many counts, way by way")
    parser.add_argument("--json", type=Path, help="write the result there too")
    args = parser.parse_args()
    vocab = int(json.loads((args.model / "config.json").read_text())["vocab_size"])
    shape = {key: value for key, value in vars(args).items() if key not in ("model", "json")}
    measured = asyncio.run(measure(args, vocab))
    text = json.dumps({"what": "KV tiers", **provenance(), "model": args.model.name, **shape, **measured}, indent=1)
    print(text)
    if args.json:
        args.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
