"""Replays a trace against placement alone: real fleet, index and policy; workers are a prefill rate and an LRU set.

Answers with the share of the infinite cache's hits that placement keeps, and how unevenly the work falls. A trace row
is (seconds, block ids of the prompt, output tokens); the infinite cache is one that everybody shares and never evicts.
"""

from __future__ import annotations

import heapq
import json
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from fakes.beliefs import fleet_of, welcome

from penstock.router.fleet import Stake
from penstock.router.placement import Ask, Placement
from penstock.router.prefix_index import PrefixIndex
from penstock.router.settings import IndexSettings, PlacementSettings
from penstock.workers.protocol import KVEvents, KVSnapshot

BLOCK = 16
TOKEN_S = 0.02  # pace of decoding
MIX = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Row:
    at_s: float
    blocks: tuple[int, ...]
    outputs: int


@dataclass
class Worker:
    """A prefix cache and a queue."""

    capacity: int
    cache: OrderedDict[int, None] = field(default_factory=OrderedDict)
    sequence: int = 0
    free_at: float = 0.0
    computed: int = 0
    requests: int = 0

    def serve(self, digests: list[int]) -> tuple[int, KVEvents]:
        """Leading blocks found, and the event that follows."""
        hit = 0
        while hit < len(digests) and digests[hit] in self.cache:
            self.cache.move_to_end(digests[hit])
            hit += 1
        stored = [digest for digest in digests[hit:] if digest not in self.cache]
        self.cache.update(dict.fromkeys(digests[hit:]))
        evicted = [self.cache.popitem(last=False)[0] for _ in range(len(self.cache) - self.capacity)]
        self.sequence += 1
        return hit, KVEvents(self.sequence, np.array(stored, "<u8").tobytes(), np.array(evicted, "<u8").tobytes())


@dataclass(frozen=True)
class Outcome:
    kept: float  # hits over the infinite cache's hits
    infinite: float  # the infinite cache's hits over all blocks
    work_imbalance: float  # largest over mean of the prefill tokens computed
    request_imbalance: float
    median_wait_s: float


def replay(
    rows: Sequence[Row],
    settings: PlacementSettings,
    *,
    workers: int = 4,
    tokens_per_s: float = 2000,
    capacity: int = 1 << 40,
) -> Outcome:
    names = [f"w{number}" for number in range(workers)]
    fleet = fleet_of(*(welcome(name, num_blocks=1 << 20, max_num_seqs=256, block_size=BLOCK) for name in names))
    index = PrefixIndex(IndexSettings())
    for name in names:
        index.track(name)
        index.apply_snapshot(name, KVSnapshot(0, b""))
    placement = Placement(settings, fleet, index, np.random.default_rng(0).random)
    simulated = {name: Worker(capacity) for name in names}
    ends: list[tuple[float, int, bool, Stake, int]] = []
    everything: set[int] = set()
    hits = infinite_hits = blocks = 0
    waits: list[float] = []
    for number, row in enumerate(rows):
        while ends and ends[0][0] <= row.at_s:
            at_s, _, last, stake, outputs = heapq.heappop(ends)
            fleet.computed(stake, at_s)
            if last:
                fleet.close(stake)
                fleet.add_work(stake.view, outputs, at_s)
        digests = (np.array(row.blocks, np.uint64) + np.uint64(1)) * MIX
        ids = digests.tolist()
        route = placement.choose(Ask(len(ids) * BLOCK + 1, row.outputs, digests), row.at_s)
        assert route is not None
        assert route.decode is not None
        worker = simulated[route.decode]
        hit, event = worker.serve(ids)
        infinite_hits += next((i for i, digest in enumerate(ids) if digest not in everything), len(ids))
        everything.update(ids)
        hits += hit
        blocks += len(ids)
        computed = (len(ids) - hit) * BLOCK + 1
        worker.computed += computed
        worker.requests += 1
        worker.free_at = max(row.at_s, worker.free_at) + computed / tokens_per_s
        waits.append(worker.free_at - row.at_s)
        stake = fleet.stake(route.decode, route.prefill_tokens, len(ids) - hit, row.at_s)
        index.assume(route.decode, digests, row.at_s)
        index.apply_events(route.decode, event)
        heapq.heappush(ends, (worker.free_at, 2 * number, False, stake, 0))
        heapq.heappush(ends, (worker.free_at + row.outputs * TOKEN_S, 2 * number + 1, True, stake, row.outputs))
    work = np.array([worker.computed for worker in simulated.values()])
    requests = np.array([worker.requests for worker in simulated.values()])
    return Outcome(
        hits / max(1, infinite_hits), infinite_hits / max(1, blocks), work.max() / work.mean(),
        requests.max() / requests.mean(), float(np.median(waits)),
    )  # fmt: skip


def conversations(count: int, seed: int = 0, rate_per_s: float = 2.0, system_blocks: int = 8) -> list[Row]:
    """Multi-turn chats with think times over one of three system prompts, turns interleaved."""
    rng = np.random.default_rng(seed)
    fresh = iter(range(1000, 1 << 40))
    rows: list[Row] = []
    start = 0.0
    for _ in range(count):
        start += rng.exponential(1 / rate_per_s)
        context = [int(rng.integers(3)) * 100 + i for i in range(system_blocks)]
        at_s = start
        for _ in range(int(rng.geometric(0.25))):
            context += [next(fresh) for _ in range(int(rng.integers(1, 30)))]
            outputs = int(rng.integers(1, 300))
            rows.append(Row(at_s, tuple(context), outputs))
            context += [next(fresh) for _ in range(outputs // BLOCK)]
            at_s += 5 + rng.exponential(20)
    return sorted(rows, key=lambda row: row.at_s)


def mooncake(path: Path, count: int, skip: int = 0) -> Iterator[Row]:
    """Rows of the Mooncake conversation trace; lengths divided by 32: its 512-token blocks stand for ours of 16."""
    with path.open() as lines:
        for number, line in enumerate(lines):
            if skip <= number < skip + count:
                raw = json.loads(line)
                whole = raw["hash_ids"][: raw["input_length"] // 512]
                yield Row(raw["timestamp"] / 1000, tuple(whole), max(1, raw["output_length"] // 32))
