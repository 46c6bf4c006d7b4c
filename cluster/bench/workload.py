"""What a benchmark sends and when: prompts of token ids with lengths, and arrival times.

Used by `commands/bench.py`. Pure: seeds come in, the same seed gives the same load. Arrivals follow vLLM's bench:
gaps of a Gamma distribution (Poisson at burstiness 1), rescaled so that the last request arrives at N / rate.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np

from penstock.workers.errors import ConfigError

FIRST_ID = 8  # smaller ids are often special tokens
TRACE_BLOCK_TOKENS = 512  # Mooncake traces name prompts in blocks of so many tokens


@dataclass(frozen=True, slots=True)
class Planned:
    """One request of the plan. `at_s` counts from the start; equal `hash_ids` are equal prefix blocks."""

    at_s: float
    input_tokens: int
    output_tokens: int
    hash_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Scaling:
    """A trace made to fit a small machine: lengths divided, time stretched."""

    length_divisor: float = 1.0
    time_stretch: float = 1.0


def fixed_plan(count: int, input_tokens: int, output_tokens: int, arrivals: Sequence[float]) -> list[Planned]:
    """Requests of one size."""
    return [Planned(arrivals[i], input_tokens, output_tokens) for i in range(count)]


def arrival_times(count: int, rate: float, burstiness: float, seed: int) -> list[float]:
    """Seconds from the start; all zero when `rate` is infinite."""
    if rate == float("inf"):
        return [0.0] * count
    gaps = np.random.default_rng(seed).gamma(burstiness, 1.0 / (rate * burstiness), count)
    times = np.cumsum(gaps)
    return [float(t) for t in times * (count / rate / times[-1])]


def read_trace(path: Path, count: int, scaling: Scaling) -> list[Planned]:
    """The first `count` requests of a Mooncake (.jsonl) or Azure (.csv) trace. Raises ConfigError naming the file."""
    try:
        rows = _mooncake(path, count) if path.suffix == ".jsonl" else _azure(path, count)
    except (OSError, KeyError, ValueError) as error:
        raise ConfigError(f"{path}: not a Mooncake .jsonl or Azure .csv trace: {error}", key="--trace") from error
    if not rows:
        raise ConfigError(f"{path}: holds no request", key="--trace")
    return [
        Planned(
            (row.at_s - rows[0].at_s) * scaling.time_stretch,
            max(1, round(row.input_tokens / scaling.length_divisor)),
            max(1, round(row.output_tokens / scaling.length_divisor)),
            row.hash_ids,
        )
        for row in rows
    ]


def prompt_tokens(plan: Planned, number: int, vocab_size: int, seed: int, scaling: Scaling) -> list[int]:
    """Random ids; blocks with equal hash ids are equal, so that prefix caches find what the trace's prompts shared."""
    low, high = min(FIRST_ID, vocab_size - 1), vocab_size
    block = max(1, round(TRACE_BLOCK_TOKENS / scaling.length_divisor))
    tokens: list[int] = []
    for hash_id in plan.hash_ids:
        tokens += np.random.default_rng((seed, 1, hash_id)).integers(low, high, block).tolist()
    missing = plan.input_tokens - len(tokens)
    if missing > 0:
        tokens += np.random.default_rng((seed, 2, number)).integers(low, high, missing).tolist()
    return tokens[: plan.input_tokens]


def _mooncake(path: Path, count: int) -> list[Planned]:
    rows: list[Planned] = []
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            raw = json.loads(line)
            ids = tuple(raw.get("hash_ids", ()))
            rows.append(Planned(raw["timestamp"] / 1000, raw["input_length"], raw["output_length"], ids))
            if len(rows) == count:
                break
    return rows


def _azure(path: Path, count: int) -> list[Planned]:
    rows: list[Planned] = []
    with path.open(encoding="utf-8", newline="") as lines:
        for raw in csv.DictReader(lines):
            at = datetime.fromisoformat(raw["TIMESTAMP"][:26])  # the seventh digit of a second is dropped
            rows.append(Planned(at.timestamp(), int(raw["ContextTokens"]), int(raw["GeneratedTokens"])))
            if len(rows) == count:
                break
    return rows
