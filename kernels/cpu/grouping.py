"""Which rows of a ragged batch are computed together: little padding, few calls, bounded memory.

Called by `kernels/cpu/attention.py` when it plans a step. Pure numpy; knows only lengths.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

I32 = NDArray[np.int32]

# A group's gathered keys and values stay within this, near the size of a core's own cache.
GATHER_BYTES = 2 << 20
# A group's additive mask stays within this many elements.
MASK_ELEMENTS = 8 << 20
# Rows shorter than this share of the longest row start a new group, unless the longest is short anyway.
LEAST_FILL = 0.6
SHORT = 64


@dataclass(frozen=True, slots=True, eq=False)
class RowGroup:
    """Rows, in ascending order, and the padded shape they share; `causal`: all start at position 0, no window cuts."""

    rows: NDArray[np.int64]
    num_queries: int
    num_keys: int
    causal: bool


def group_rows(starts: I32, counts: I32, token_bytes: int, window: int = 0) -> list[RowGroup]:
    """Partition the rows; every row has at least one new token. `token_bytes`: keys and values of one token.

    `window`: tokens that each query attends to, 0 = all.
    """
    single = counts == 1
    fresh = ~single & (starts == 0) & ((counts <= window) if window else True)
    groups = []
    for kind in (single, fresh, ~single & ~fresh):
        rows = np.flatnonzero(kind)
        if len(rows):
            causal = bool(fresh[rows[0]])
            groups += _split(rows, counts[rows], (starts + counts)[rows], token_bytes, causal)
    return groups


def _split(rows: NDArray[np.int64], counts: I32, lengths: I32, token_bytes: int, causal: bool) -> list[RowGroup]:
    """Longest first; a row that would be mostly padding, or that would make the group too large, opens the next."""
    order = np.lexsort((-counts, -lengths))
    rows, counts, lengths = rows[order], counts[order], lengths[order]
    groups: list[RowGroup] = []
    begin = 0
    while begin < len(rows):
        longest, queries = int(lengths[begin]), int(counts[begin])
        room = min(GATHER_BYTES // (longest * token_bytes), MASK_ELEMENTS // (longest * queries))
        end = min(len(rows), begin + max(1, room))
        alike = _alike(lengths[begin:end], longest) & _alike(counts[begin:end], queries)
        end = end if alike.all() else begin + int(np.argmin(alike))
        widest = int(counts[begin:end].max())
        groups.append(RowGroup(np.sort(rows[begin:end]), widest, longest, causal))
        begin = end
    return groups


def _alike(sizes: I32, size: int) -> NDArray[np.bool_]:
    if size <= SHORT:
        return sizes <= SHORT
    return (sizes >= LEAST_FILL * size) & (sizes * LEAST_FILL <= size)
