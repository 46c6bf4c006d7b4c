"""Which prompts of a step all attention ranks compute together, and in which scratch blocks others than their owner
keep them.

Called by `attention_ranks.py` on every rank for every plan in order; what it remembers follows from the plans alone, so
all ranks remember the same. A prompt keeps its scratch from step to step, until others need the room: while it does,
only its new tokens travel. Where it has none, or not up to where a chunk begins (its beginning was found in the prefix
cache, computed before a preemption, or in chunks too short to be shared), the owner's copy is the truth and is brought.
Pure; it knows neither tensors nor messages.

Invariant: a scratch block is free or of one prompt; what is kept under a slot is of the sequence that has had the slot
ever since, because a plan tells which sequences got theirs for this step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from penstock.workers.parallel.context_parallel import SharedChunk, zigzag
from penstock.workers.scheduler.plan import StepPlan

MOST_SHARED = 16  # prompts of one step; each makes a rank's part one row longer than the plan


@dataclass(frozen=True, slots=True)
class Banks:
    """What the ranks' storages hold: `blocks` of their bank each, and behind them `scratch` for shared prompts."""

    blocks: int
    scratch: int = 0
    threshold: int = 0  # tokens of one prompt in one step from which on all ranks compute it; 0 = never


class _Kept(NamedTuple):
    """What is in scratch of one prompt: its leading `end` tokens."""

    blocks: list[int]
    end: int


class SharedPrompts:
    """What the ranks `members` keep in the scratch blocks, which lie behind those of each one's bank."""

    def __init__(self, members: tuple[int, ...], banks: Banks, block_size: int) -> None:
        self._members = members
        ranks = len(members)
        self._least = max(banks.threshold, 2 * ranks) if banks.threshold and ranks > 1 else 0
        self._owned = banks.blocks
        self._block_size = block_size
        self._free = list(range(banks.blocks + banks.scratch - 1, banks.blocks - 1, -1))
        self._kept: dict[int, _Kept] = {}  # by slot, those used least recently first

    def choose(self, plan: StepPlan) -> tuple[SharedChunk, ...]:
        """The chunks of the next plan that all ranks compute, in the order of its rows.

        All of at least `threshold` tokens, the longest first, as long as they find room in the scratch. A prompt
        whose tokens are scored stays with its owner.
        """
        if not self._least:
            return ()
        for slot in plan.slots[plan.num_continued :].tolist():
            self._forget(slot)
        counts = np.diff(plan.offsets)
        rows = [row for row in np.flatnonzero(counts >= self._least).tolist() if not _is_scored(plan, row)]
        rows.sort(key=lambda row: (-int(counts[row]), row))
        found: dict[int, SharedChunk] = {}
        for row in rows:
            if len(found) == MOST_SHARED:
                break
            chunk = self._share(plan, row, int(counts[row]), {int(plan.slots[row]) for row in found})
            if chunk is not None:
                found[row] = chunk
        return tuple(found[row] for row in sorted(found))

    def _share(self, plan: StepPlan, row: int, count: int, in_use: set[int]) -> SharedChunk | None:
        """The chunk with its scratch; None where that has no room beside those `in_use`."""
        slot, start = int(plan.slots[row]), int(plan.starts[row])
        kept = self._kept.get(slot, _Kept([], 0))
        missing = -(-(start + count) // self._block_size) - len(kept.blocks)
        idle = [other for other in self._kept if other != slot and other not in in_use]
        if missing > len(self._free) + sum(len(self._kept[other].blocks) for other in idle):
            return None
        for other in idle:
            if missing > len(self._free):
                self._forget(other)
        blocks = kept.blocks + [self._free.pop() for _ in range(missing)]
        self._kept.pop(slot, None)
        self._kept[slot] = _Kept(blocks, start + count)
        return SharedChunk(
            row=row,
            start=start,
            count=count,
            owner=self._members.index(int(plan.block_tables[row, 0]) // self._owned),
            held=kept.end,
            scratch=np.array(blocks, np.int32),
            pieces=zigzag(count, len(self._members)),
        )

    def _forget(self, slot: int) -> None:
        kept = self._kept.pop(slot, None)
        if kept is not None:
            self._free += reversed(kept.blocks)


def _is_scored(plan: StepPlan, row: int) -> bool:
    if plan.scored is None:
        return False
    rows = plan.scored.token_rows
    return bool(((rows >= plan.offsets[row]) & (rows < plan.offsets[row + 1])).any())
