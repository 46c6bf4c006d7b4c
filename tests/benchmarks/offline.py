"""Offline throughput of one mixed worker's engine in this process: scheduler, runner, commit; no network, no Ray.

    python tests/benchmarks/offline.py --model DIR --requests 32 --input 256 --output 64 [--json | --on-command]

Prints output tokens/s with all requests at once and for a single stream (medians of the repeats, after one warm-up),
with prefix caching off and end-of-sequence ignored, as peers are measured. With --on-command it waits for lines `batch`
or `single` and answers each with one JSON line, so that beside_vllm.py can alternate it with a peer.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from fakes.in_process import InProcessWorker, load_runner

from penstock.workers.protocol import Tokens
from penstock.workers.settings import SchedulerSettings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--input", type=int, default=256)
    parser.add_argument("--output", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--max-num-batched-tokens", type=int, default=512)
    parser.add_argument("--on-command", action="store_true", help="one measurement per line of standard input")
    parser.add_argument("--json", action="store_true", help="print one JSON line only")
    args = parser.parse_args()

    begin = time.perf_counter()
    longest = args.input + args.output
    scheduler = SchedulerSettings(
        max_num_seqs=max(args.requests, 1),
        max_num_batched_tokens=args.max_num_batched_tokens,
        max_model_len=longest,
        max_waiting=max(1024, args.requests),
        reserve_tokens=args.output,
    )
    runner = load_runner(
        args.model,
        dtype=args.dtype,
        threads=args.threads,
        max_num_seqs=scheduler.max_num_seqs,
        max_num_batched_tokens=scheduler.max_num_batched_tokens,
        max_model_len=longest,
    )
    num_blocks = args.requests * -(-longest // runner.layout.block_size) + 64
    worker = InProcessWorker(runner, num_blocks=num_blocks, prefix_caching=False, scheduler=scheduler)
    started = time.perf_counter() - begin
    rng = random.Random(0)

    def rate(count: int) -> float:
        prompts: list[Tokens] = [
            tuple(rng.randrange(runner.vocab_size) for _ in range(args.input)) for _ in range(count)
        ]
        begin = time.perf_counter()
        outputs = worker.greedy(prompts, args.output)
        return sum(len(output.tokens) for output in outputs) / (time.perf_counter() - begin)

    rate(args.requests)
    if args.on_command:
        print(json.dumps({"start_s": round(started, 1)}), flush=True)
        for line in sys.stdin:
            print(json.dumps({"tok_s": rate(args.requests if line.strip() == "batch" else 1)}), flush=True)
        worker.close()
        return
    batch = [rate(args.requests) for _ in range(args.repeats)]
    single = [rate(1) for _ in range(args.repeats)]
    worker.close()
    result = {
        "engine": "penstock",
        "compile": False,
        "requests": args.requests,
        "input": args.input,
        "output": args.output,
        "batch_output_tok_s": round(statistics.median(batch), 1),
        "single_output_tok_s": round(statistics.median(single), 1),
        "start_s": round(started, 1),
    }
    print(json.dumps(result) if args.json else "\n".join(f"{key:20} {value}" for key, value in result.items()))


if __name__ == "__main__":
    main()
