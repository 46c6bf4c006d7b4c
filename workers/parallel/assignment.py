"""Least-cost assignment of rows to columns that take several rows each.

Called by the expert planner: experts to ranks (capacity = slots), and plan ranks to real ranks (capacity 1). Pure.
The method is successive shortest paths over columns (Ahuja, Magnanti and Orlin 1993, section 9.7): since a column's
rows are interchangeable, an augmenting path visits columns, of which there are few, and not rows.
"""

from __future__ import annotations

import itertools

import numpy as np
from numpy.typing import NDArray

from penstock.workers.errors import IntegrityError

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]


def assign(cost: F64, capacity: I64) -> I64:
    """The column of every row, int64 [n], with the least sum of cost [n, m] and at most capacity [m] rows a column.

    Costs are finite, of either sign. Ties go to the lower column. Raises IntegrityError where rows do not fit.
    """
    rows, columns = cost.shape
    if int(capacity.sum()) < rows:
        raise IntegrityError(f"{rows} rows do not fit {int(capacity.sum())} places")
    owner: I64 = np.full(rows, -1, dtype=np.int64)
    room = capacity.astype(np.int64).copy()
    # shift[g, h]: least extra cost of moving one row from column g to h; mover[g, h]: that row.
    shift = np.full((columns, columns), np.inf)
    mover: I64 = np.full((columns, columns), -1, dtype=np.int64)
    for row in range(rows):
        target, before = _cheapest(cost[row], shift, room)
        path = [target]
        while before[path[-1]] >= 0:
            path.append(int(before[path[-1]]))
        for column, previous in itertools.pairwise(path):
            owner[mover[previous, column]] = column
        owner[row] = path[-1]
        room[target] -= 1
        for column in path:
            _renew(column, cost, owner, shift, mover)
    return owner


def _cheapest(start: F64, shift: F64, room: I64) -> tuple[int, I64]:
    """The column with room that a new row's chain of shifts ends in at least cost, and each column's predecessor."""
    distance = start.copy()
    before: I64 = np.full(len(start), -1, dtype=np.int64)
    # Bellman and Ford's: some shifts save cost, but no cycle of them does, or the assignment so far were not the best.
    for _ in range(len(start)):
        through = distance[:, None] + shift
        nearest = through.argmin(axis=0)
        best = through[nearest, np.arange(len(start))]
        closer = best < distance - 1e-12 * (1.0 + np.abs(distance))
        if not closer.any():
            break
        distance = np.where(closer, best, distance)
        before = np.where(closer, nearest, before)
    open_distance = np.where(room > 0, distance, np.inf)
    return int(open_distance.argmin()), before


def _renew(column: int, cost: F64, owner: I64, shift: F64, mover: I64) -> None:
    """Recompute what leaving `column` costs, after its rows changed."""
    own = np.flatnonzero(owner == column)
    if not len(own):
        shift[column], mover[column] = np.inf, -1
        return
    extra = cost[own] - cost[own, column][:, None]
    best = extra.argmin(axis=0)
    shift[column] = extra[best, np.arange(cost.shape[1])]
    shift[column, column] = np.inf
    mover[column] = own[best]
