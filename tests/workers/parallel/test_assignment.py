"""Assignments against trying all of them."""

import itertools

import numpy as np
import pytest

from penstock.workers.errors import IntegrityError
from penstock.workers.parallel.assignment import assign


def best_by_hand(cost, capacity):
    rows, columns = cost.shape
    return min(
        sum(cost[row, column] for row, column in enumerate(choice))
        for choice in itertools.product(range(columns), repeat=rows)
        if (np.bincount(choice, minlength=columns) <= capacity).all()
    )


@pytest.mark.parametrize("seed", range(60))
def test_cost_is_the_least(seed):
    chance = np.random.default_rng(seed)
    columns = int(chance.integers(1, 4))
    capacity = chance.integers(0, 4, columns)
    rows = int(chance.integers(0, min(6, capacity.sum()) + 1))
    # Small whole numbers tie often.
    whole = chance.integers(-2, 3, (rows, columns)).astype(float)
    cost = whole if seed % 2 else chance.normal(size=(rows, columns))
    owner = assign(cost, capacity)
    assert (np.bincount(owner, minlength=columns) <= capacity).all()
    found = cost[np.arange(rows), owner].sum()
    assert found == pytest.approx(best_by_hand(cost, capacity) if rows else 0.0)


def test_rows_that_do_not_fit_are_refused():
    with pytest.raises(IntegrityError, match="3 rows do not fit 2 places"):
        assign(np.zeros((3, 2)), np.array([1, 1]))
