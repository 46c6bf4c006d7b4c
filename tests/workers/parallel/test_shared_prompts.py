"""Which prompts ranks share, where others than the owner keep them, and what they are known to have."""

from __future__ import annotations

from typing import Any

import numpy as np

from penstock.workers.parallel.attention_ranks import NO_SAMPLING, PlanParts
from penstock.workers.parallel.context_parallel import SharedChunk
from penstock.workers.parallel.shared_prompts import MOST_SHARED, Banks, SharedPrompts
from penstock.workers.scheduler.plan import ScoredPrompt, StepPlan

BLOCK, OWNED = 4, 50


def int32(*values: int) -> Any:
    return np.array(values, np.int32)


def plan(rows: list[tuple[int, int, int]], scored: tuple[int, ...] = (), continued: int = 0, bank: int = 0) -> StepPlan:
    """Rows of (slot, start, tokens), the first `continued` of which were in an earlier step."""
    counts = [count for _, _, count in rows]
    offsets = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
    width = max(-(-(start + count) // BLOCK) for _, start, count in rows)
    asked = int32(*scored)
    return StepPlan(
        step=1,
        slots=int32(*(slot for slot, _, _ in rows)),
        starts=int32(*(start for _, start, _ in rows)),
        offsets=offsets,
        token_ids=np.arange(offsets[-1], dtype=np.int32),
        block_tables=np.array([np.arange(width) + bank * OWNED for _ in rows], np.int32),
        sample_rows=np.arange(len(rows), dtype=np.int32),
        sampling=NO_SAMPLING,
        num_decode=0,
        scored=ScoredPrompt(asked, asked, asked) if scored else None,
        num_continued=continued,
    )


def prompts(threshold: int, scratch: int = 100, ranks: int = 2) -> SharedPrompts:
    return SharedPrompts(tuple(range(ranks)), Banks(OWNED, scratch, threshold), BLOCK)


def rows_of(chunks: tuple[SharedChunk, ...]) -> list[int]:
    return [chunk.row for chunk in chunks]


def test_all_prompts_from_the_threshold_on() -> None:
    step = plan([(0, 0, 1), (1, 0, 40), (2, 8, 50), (3, 0, 39)])
    chunks = prompts(40).choose(step)
    assert [(chunk.row, chunk.start, chunk.end, chunk.held) for chunk in chunks] == [(1, 0, 40, 0), (2, 8, 58, 0)]
    assert len({*chunks[0].scratch.tolist(), *chunks[1].scratch.tolist()}) == 10 + 15  # nobody's twice
    assert rows_of(prompts(51).choose(step)) == []
    assert rows_of(prompts(40, ranks=1).choose(step)) == []
    assert rows_of(prompts(0).choose(step)) == []


def test_no_more_than_there_is_room_for_the_longest_first() -> None:
    step = plan([(1, 0, 40), (2, 8, 50), (3, 0, 20)])
    assert rows_of(prompts(16, scratch=20).choose(step)) == [1, 2]  # 15 and 5 blocks
    assert rows_of(prompts(16, scratch=14).choose(step)) == [0]
    assert len(prompts(4).choose(plan([(slot, 0, 4) for slot in range(20)]))) == MOST_SHARED


def test_a_scored_prompt_is_not_shared() -> None:
    assert rows_of(prompts(30).choose(plan([(1, 0, 40), (2, 0, 50)], scored=(45, 60)))) == [0]


def test_what_is_in_scratch_is_not_brought_again() -> None:
    shared = prompts(8)
    (first,) = shared.choose(plan([(3, 0, 10)]))
    (second,) = shared.choose(plan([(3, 10, 10)], continued=1))
    assert second.held == 10
    assert second.scratch[:3].tolist() == first.scratch.tolist()
    shared.choose(plan([(4, 0, 10)]))  # a step without it
    shared.choose(plan([(3, 20, 5)], continued=1))  # a chunk of its own, too short to be shared
    (third,) = shared.choose(plan([(3, 25, 10)], continued=1))
    assert (third.held, third.start) == (20, 25)


def test_a_slot_taken_anew_has_nothing_in_scratch() -> None:
    shared = prompts(8)
    shared.choose(plan([(3, 0, 10)]))
    (again,) = shared.choose(plan([(3, 10, 10)]))  # another sequence, or this one after it gave way
    assert again.held == 0
    shared.choose(plan([(3, 0, 10)]))
    shared.choose(plan([(3, 8, 4)]))  # taken by one whose chunk is too short to be shared
    (later,) = shared.choose(plan([(3, 12, 10)], continued=1))
    assert later.held == 0


def test_room_is_taken_from_whoever_was_not_shared_for_longest() -> None:
    shared = prompts(8, scratch=10)
    for slot in (1, 2, 3):
        shared.choose(plan([(slot, 0, 12)]))  # 3 blocks each
    shared.choose(plan([(1, 12, 4)], continued=1))
    shared.choose(plan([(1, 16, 12)], continued=1))  # 4 more, of which 1 is free: those of slot 2
    (kept,) = shared.choose(plan([(3, 12, 8)], continued=1))
    assert kept.held == 12
    (lost,) = shared.choose(plan([(2, 12, 8)], continued=1))
    assert lost.held == 0


def test_a_shared_prompt_lies_in_the_owners_blocks_and_in_scratch_elsewhere() -> None:
    parts = PlanParts((0, 1), Banks(blocks=OWNED, scratch=20, threshold=32), BLOCK)
    cut = parts.cut(plan([(5, 0, 40)], bank=1))
    own, other = cut.part(1), cut.part(0)
    assert own.block_tables.tolist() == [list(range(10))] * 2
    assert other.block_tables.tolist() == [list(range(50, 60))] * 2
    assert (other.starts.tolist(), other.offsets.tolist()) == ([0, 30], [0, 10, 20])
    assert (own.starts.tolist(), own.token_ids.tolist()) == ([10, 20], list(range(10, 30)))
    assert [sampled.tolist() for sampled, _ in cut.wanted] == [[0], []]  # the last token is rank 0's
    assert other.sample_rows.tolist() == [1]
