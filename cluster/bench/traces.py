"""Public traces as plans: Mooncake (.jsonl), Azure LLM inference and BurstGPT (.csv); sliced, scaled by stated factors.

Used by `commands/bench.py` and by scripts under `tests/benchmarks/`. Knows the files' columns and nothing of servers.
Rows without output (failed requests) are dropped and counted. The two lengths of a row stay together.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np

from penstock.cluster.bench.workload import Piece, Planned
from penstock.workers.errors import ConfigError

MOONCAKE_BLOCK_TOKENS = 512  # a prompt is named by one id per so many tokens


@dataclass(frozen=True, slots=True)
class Row:
    """One request of a trace: seconds (any origin), tokens, and ids of its prompt's blocks where the trace has them."""

    at_s: float
    input_tokens: int
    output_tokens: int
    hash_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Scaling:
    """A trace made to fit a small machine. Stretching time keeps the shape of bursts, thinning keeps the clock."""

    length_divisor: float = 1.0
    time_stretch: float = 1.0
    keep: float = 1.0  # share of the rows that are sent, drawn by seed

    @property
    def block_tokens(self) -> int:
        """Tokens that one block id of a Mooncake trace stands for."""
        return max(1, round(MOONCAKE_BLOCK_TOKENS / self.length_divisor))


@dataclass(frozen=True, slots=True)
class Slice:
    """Which rows: from `start_s` after the first one, for `duration_s`, at most `count`, none that is too long."""

    count: int | None = None
    start_s: float = 0.0
    duration_s: float = math.inf
    max_tokens: int | None = None  # of prompt and answer together, after scaling


@dataclass(frozen=True, slots=True)
class TracePlan:
    """The requests, and what was left out of the slice."""

    plan: tuple[Planned, ...]
    without_output: int
    too_long: int


def read_rows(path: Path) -> Iterator[Row]:
    """All rows of a trace file, in its order. Raises ConfigError naming the file."""
    try:
        yield from _mooncake(path) if path.suffix == ".jsonl" else _csv(path)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{path}: not a Mooncake .jsonl, Azure .csv or BurstGPT .csv trace: {error}", "--trace"
        ) from error


def read_trace(path: Path, part: Slice, scaling: Scaling, seed: int = 0) -> TracePlan:
    """The plan of one slice. Raises ConfigError when it holds no request."""
    rng = np.random.default_rng(seed)
    plan: list[Planned] = []
    first: float | None = None
    without_output = too_long = 0
    for row in read_rows(path):
        first = row.at_s if first is None else first
        offset = row.at_s - first - part.start_s
        if offset < 0 or offset > part.duration_s or (scaling.keep < 1.0 and rng.random() >= scaling.keep):
            continue
        if row.output_tokens <= 0:
            without_output += 1
            continue
        planned = _scaled(row, offset, scaling)
        if part.max_tokens is not None and planned.input_tokens + planned.output_tokens > part.max_tokens:
            too_long += 1
            continue
        plan.append(planned)
        if part.count is not None and len(plan) >= part.count:
            break
    if not plan:
        raise ConfigError(f"{path}: this slice holds no request", key="--trace")
    return TracePlan(tuple(plan), without_output, too_long)


def _scaled(row: Row, offset_s: float, scaling: Scaling) -> Planned:
    return Planned(
        offset_s * scaling.time_stretch,
        max(1, round(row.input_tokens / scaling.length_divisor)),
        max(1, round(row.output_tokens / scaling.length_divisor)),
        tuple(Piece((hash_id,), scaling.block_tokens) for hash_id in row.hash_ids),
    )


def _mooncake(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            raw = json.loads(line)
            ids = tuple(map(int, raw.get("hash_ids", ())))
            yield Row(raw["timestamp"] / 1000, int(raw["input_length"]), int(raw["output_length"]), ids)


def _csv(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8", newline="") as lines:
        for raw in csv.DictReader(lines):
            if "ContextTokens" in raw:
                yield Row(_seconds(raw["TIMESTAMP"]), int(raw["ContextTokens"]), int(raw["GeneratedTokens"]))
            else:
                yield Row(float(raw["Timestamp"]), int(raw["Request tokens"]), int(raw["Response tokens"]))


def _seconds(stamp: str) -> float:
    """UTC seconds of `2023-11-16 18:15:46.6805900` (any number of digits, an offset may follow)."""
    whole, _, rest = stamp.partition(".")
    digits = rest.partition("+")[0].rstrip("Z")
    at = datetime.fromisoformat(whole.partition("+")[0] + "+00:00")
    return at.timestamp() + (float(f"0.{digits}") if digits else 0.0)
