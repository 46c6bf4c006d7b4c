"""Public traces replayed in an open loop through a 1 + 1 cluster over HTTP, by `penstock bench`.

    python tests/benchmarks/replay.py --model DIR --mooncake FILE.jsonl --azure FILE.csv --json OUT

Both slices run one after the other against the same cluster, each at its own stated factors: lengths divided, time
stretched, so that a prefill worker with one thread of two cores can keep up. Goodput counts requests within 2 s to
the first token and 200 ms for each further one.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from provenance import provenance

sys.path.insert(0, str(Path(__file__).parents[1]))
from fakes.launched_cluster import LaunchedCluster  # tests/ is only a folder to this script

KEPT = (
    "num_prompts trace trace_start length_divisor time_stretch rows_too_long completed failed duration_s "
    "total_input_tokens total_output_tokens request_throughput output_throughput request_goodput "
    "cache_hit_rate infinite_cache_hit_rate median_ttft_ms p95_ttft_ms p99_ttft_ms median_tpot_ms p95_tpot_ms "
    "p99_itl_ms p99_send_lag_ms errors"
).split()


def replay(url: str, trace: Path, factors: list[str]) -> dict[str, Any]:
    """The figures of one slice; `factors` are flags of `penstock bench`."""
    command = [str(Path(sys.executable).parent / "penstock"), "bench", "--url", url, "--trace", str(trace), *factors]
    slos = ["--goodput", "ttft:2000", "--goodput", "tpot:200"]
    done = subprocess.run([*command, *slos, "--json", "-"], capture_output=True, text=True, timeout=900, check=False)
    if not done.stdout.strip():
        raise RuntimeError(done.stderr[-2000:])
    found = json.loads(done.stdout)
    return {name: found[name] for name in KEPT if name in found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--mooncake", type=Path, required=True)
    parser.add_argument("--azure", type=Path, required=True)
    parser.add_argument("--requests", type=int, default=150)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    values = {
        "runner.model_dir": str(args.model),
        "runner.threads": 1,
        "front.skip_tokenizer_init": not (args.model / "tokenizer.json").exists(),
        "scheduler.max_model_len": 4096,
        "kv.memory_bytes": 2 << 30,
    }
    count = ["--num-prompts", str(args.requests)]
    with tempfile.TemporaryDirectory() as folder:
        cluster = LaunchedCluster(Path(folder), values)
        try:
            cluster.wait_ready(120)
            mooncake = replay(cluster.url, args.mooncake, [*count, "--length-divisor", "16", "--time-stretch", "2"])
            azure = replay(cluster.url, args.azure, [*count, "--length-divisor", "4", "--time-stretch", "4"])
            cluster.terminate()
        finally:
            cluster.end()
    result = {
        "what": "trace replay",
        **provenance(),
        "model": args.model.name,
        "configuration": {k: v for k, v in values.items() if k != "runner.model_dir"},
        "mooncake": mooncake,
        "azure": azure,
    }
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
