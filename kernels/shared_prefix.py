"""Which rows of a batch share leading blocks, so that attention reads those blocks once (Juravsky et al. 2024).

Called by `kernels/gpu/attention_plan.py` once per step. Pure numpy: knows block tables and lengths, no tensors and no
requests. Blocks are shared when their numbers are equal, level by level from the first: a tree whose inner nodes are
runs of blocks with all the rows below them (Juravsky et al. 2024, "Hydragen", sections 3.1 and 3.4).
Legend: N rows, W block-table width, P slots of a block.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

I64 = NDArray[np.int64]

# Columns compared at a time: most prefixes end within a few such steps, and one step stays within the cache.
STRIDE = 64


@dataclass(frozen=True, slots=True)
class SharingRule:
    """When a run of shared blocks is worth an item of its own: at least this many rows, tokens and bytes not read."""

    min_sharers: int = 4
    min_tokens: int = 256
    min_saved_bytes: int = 0  # of one layer, all kv heads
    max_nodes: int = 32
    max_visits: int = 64  # runs looked at in one step, so that a hostile batch costs bounded time


@dataclass(frozen=True, slots=True, eq=False)
class SharedRun:
    """Blocks `begin` to `end` of the tables of `rows` (ascending) are the same."""

    rows: I64
    begin: int
    end: int


def find_shared(
    tables: NDArray[np.int32], full_blocks: I64, slots: int, token_bytes: int, rule: SharingRule
) -> tuple[SharedRun, ...]:
    """The runs worth sharing, every parent before its children; a row's runs follow one another without a gap.

    tables [N, W]; full_blocks [N]: the leading blocks of each row that are full and may be shared, 0 for a row that
    takes no part; token_bytes: keys and values of one token in one layer.
    """
    found: list[SharedRun] = []
    # Each entry: rows that agree before `column`; an ancestor already covers the blocks before `begin`.
    pending = [(np.flatnonzero(full_blocks > 0), 0, 0)]
    visits = 0
    while pending and len(found) < rule.max_nodes and visits < rule.max_visits:
        rows, column, begin = pending.pop()
        for members in _equal_next(tables, rows[full_blocks[rows] > column], column, rule.min_sharers):
            visits += 1
            end = _common_end(tables, members, column + 1, int(full_blocks[members].min()))
            tokens = (end - begin) * slots
            worth = tokens >= rule.min_tokens and (len(members) - 1) * tokens * token_bytes >= rule.min_saved_bytes
            if worth and len(found) < rule.max_nodes:
                found.append(SharedRun(members, begin, end))
            pending.append((members, end, end if worth else begin))
    return tuple(found)


def private_begins(runs: tuple[SharedRun, ...], num_rows: int) -> I64:
    """[N] the first block of each row that no run covers."""
    begins = np.zeros(num_rows, np.int64)
    for run in runs:
        begins[run.rows] = run.end
    return begins


def run_edges(numbers: NDArray[np.integer]) -> I64:
    """Where runs of equal neighbours begin, and the end of the last."""
    changes = np.ones(len(numbers) + 1, np.bool_)
    np.not_equal(numbers[1:], numbers[:-1], out=changes[1:-1])
    return changes.nonzero()[0]


def _equal_next(tables: NDArray[np.int32], rows: I64, column: int, least: int) -> list[I64]:
    """The groups of at least `least` rows whose block number at `column` is the same, in order of that number."""
    if len(rows) < least:
        return []
    numbers = tables[rows, column]
    order = numbers.argsort(kind="stable")
    edges = run_edges(numbers[order])
    return [rows[order[edges[i] : edges[i + 1]]] for i in (edges[1:] - edges[:-1] >= least).nonzero()[0]]


def _common_end(tables: NDArray[np.int32], rows: I64, column: int, limit: int) -> int:
    """The first column from `column` on, at most `limit`, where the rows' tables differ."""
    while column < limit:
        upto = min(column + STRIDE, limit)
        block = tables[rows, column:upto]
        same = (block == block[0]).all(axis=0)
        if not same.all():
            return column + int(np.argmin(same))
        column = upto
    return limit
