"""Which prompts ranks share, and that their pieces are the whole prompt, evenly much work, and exchanged in full."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from fakes.rank_threads import RankThreads

from penstock.workers.parallel.attention_ranks import NO_SAMPLING, Banks, PlanParts
from penstock.workers.parallel.context_parallel import ContextExchange, shared_chunk, zigzag
from penstock.workers.scheduler.plan import ScoredPrompt, StepPlan

BLOCK = 4


def int32(*values: int) -> Any:
    return np.array(values, np.int32)


def plan(step: int, rows: list[tuple[int, int, int]], scored: tuple[int, ...] = (), table: int = 0) -> StepPlan:
    """Rows of (slot, start, tokens), each with blocks from `table` on."""
    counts = [count for _, _, count in rows]
    offsets = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
    width = max(-(-(start + count) // BLOCK) for _, start, count in rows)
    tables = np.array([np.arange(table, table + width) for _ in rows], np.int32)
    asked = int32(*scored)
    return StepPlan(
        step=step,
        slots=int32(*(slot for slot, _, _ in rows)),
        starts=int32(*(start for _, start, _ in rows)),
        offsets=offsets,
        token_ids=np.arange(offsets[-1], dtype=np.int32),
        block_tables=tables,
        sample_rows=np.arange(len(rows), dtype=np.int32),
        sampling=NO_SAMPLING,
        num_decode=0,
        scored=ScoredPrompt(asked, asked, asked) if scored else None,
    )


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
@pytest.mark.parametrize("count", [16, 17, 31, 64, 1000, 4096])
def test_pieces_are_everything_once_and_evenly_much_work(ranks: int, count: int) -> None:
    pieces = zigzag(count, ranks)
    tokens = [token for own in pieces for begin, end in own for token in range(begin, end)]
    assert sorted(tokens) == list(range(count))
    work = [sum(token + 1 for begin, end in own for token in range(begin, end)) for own in pieces]
    if count >= 64 * ranks:  # pairs of query and key under the causal mask
        assert max(work) / (sum(work) / ranks) <= 1.02


def test_the_longest_prompt_from_the_threshold_on() -> None:
    step = plan(1, [(0, 0, 1), (1, 0, 40), (2, 0, 50), (3, 0, 39)])
    found = shared_chunk(step, 2, 40, None)
    assert found is not None
    assert (found.row, found.count, found.end, found.last_rank) == (2, 50, 50, 0)
    assert shared_chunk(step, 2, 51, None) is None
    assert shared_chunk(step, 1, 40, None) is None
    assert shared_chunk(step, 2, 0, None) is None


def test_a_scored_prompt_is_not_shared() -> None:
    step = plan(1, [(1, 0, 40), (2, 0, 50)], scored=(45, 60))
    found = shared_chunk(step, 2, 30, None)
    assert found is not None
    assert found.row == 0


def test_a_chunk_goes_on_only_right_behind_a_shared_one() -> None:
    first = shared_chunk(plan(7, [(3, 0, 40)]), 2, 32, None)
    assert first is not None
    on = plan(8, [(3, 40, 40)])
    assert shared_chunk(on, 2, 32, first) is not None
    assert shared_chunk(on, 2, 32, None) is None
    assert shared_chunk(dataclasses.replace(on, step=9), 2, 32, first) is None  # a step between
    assert shared_chunk(plan(8, [(4, 40, 40)]), 2, 32, first) is None  # another sequence
    assert shared_chunk(plan(8, [(3, 36, 40)]), 2, 32, first) is None  # other tokens
    assert shared_chunk(plan(8, [(3, 40, 40)], table=100), 2, 32, first) is None  # other blocks


def test_a_shared_prompt_lies_in_the_owners_blocks_and_in_scratch_elsewhere() -> None:
    parts = PlanParts((0, 1), Banks(blocks=50, scratch=20, threshold=32))
    cut = parts.cut(plan(1, [(5, 0, 40)], table=50))  # of rank 1
    own, other = cut.part(1), cut.part(0)
    assert own.block_tables.tolist() == [list(range(10))] * 2
    assert other.block_tables.tolist() == [list(range(50, 60))] * 2
    assert (other.starts.tolist(), other.offsets.tolist()) == ([0, 30], [0, 10, 20])
    assert (own.starts.tolist(), own.token_ids.tolist()) == ([10, 20], list(range(10, 30)))
    assert [sampled.tolist() for sampled, _ in cut.wanted] == [[0], []]  # the last token is rank 0's
    assert other.sample_rows.tolist() == [1]


@pytest.mark.parametrize("ranks", [2, 3])
def test_every_rank_ends_up_with_all_keys_and_values(ranks: int) -> None:
    count, layers = 45, 2
    cut = PlanParts(tuple(range(ranks)), Banks(blocks=30, scratch=12, threshold=16)).cut(
        plan(1, [(5, 0, count)], table=30)
    )
    truth = torch.randn(count, layers, 2, 3, 5)
    assert cut.shared is not None
    chunk = cut.shared

    def work(group: Any) -> torch.Tensor:
        table = cut.table_of_shared(group.rank)
        kv = torch.zeros(42, layers, 2, 3, BLOCK, 5)
        own = torch.from_numpy(chunk.positions(group.rank))
        blocks = torch.from_numpy(table.astype(np.int64))
        for layer in range(layers):
            kv[blocks[own // BLOCK], layer, :, :, own % BLOCK] = truth[own, layer]
        exchange = ContextExchange(group, chunk, table, BLOCK, torch.device("cpu"))
        for layer in range(layers):
            exchange.share(kv, layer)
        every = torch.arange(count)
        return torch.stack([kv[blocks[every // BLOCK], layer, :, :, every % BLOCK] for layer in range(layers)], dim=1)

    with RankThreads(ranks) as threads:
        for found in threads.all(work):
            torch.testing.assert_close(found, truth, rtol=0, atol=0)
