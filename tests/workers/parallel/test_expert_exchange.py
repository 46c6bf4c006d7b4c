"""Rows there and back on one rank: order, weights, repeated experts and choices of none."""

import numpy as np
import pytest
import torch

from penstock.workers.parallel.collectives import Alone
from penstock.workers.parallel.expert_dispatch import split_rows
from penstock.workers.parallel.expert_exchange import ExpertExchange
from penstock.workers.parallel.expert_placement import even_cuts


def run(x, ids, gates, experts=3, compute=None):
    counts = np.bincount(ids.reshape(-1) + 1, minlength=experts + 1)[None, 1:]
    split = split_rows(counts, even_cuts(np.ones((1, experts, 1), dtype=bool))[0], 0)
    scale = torch.tensor([1.0, 10.0, 100.0])
    compute = compute or (lambda rows, which: rows * scale[torch.from_numpy(which)][:, None].to(rows.dtype))
    return ExpertExchange(Alone(), (0,)).run(x, ids, gates, split, compute)


def test_terms_come_home_to_their_token_and_place():
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    ids = np.array([[2, 0], [1, 1], [-1, 2]])
    gates = torch.tensor([[0.5, 2.0], [1.0, 0.5], [9.0, 0.25]])
    y = run(x, ids, gates)
    expected = torch.stack([x[0] * (50 + 2), x[1] * (10 + 5), x[2] * 25])
    assert torch.equal(y, expected)


def test_rows_arrive_sorted_by_expert_and_token():
    seen = {}

    def compute(rows, which):
        seen.update(rows=rows[:, 0].tolist(), which=which.tolist())
        return rows

    run(torch.tensor([[1.0], [2.0], [3.0]]), np.array([[2], [0], [2]]), torch.ones(3, 1), compute=compute)
    assert seen == {"rows": [2.0, 1.0, 3.0], "which": [0, 2, 2]}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_terms_are_added_in_float32_at_least(dtype):
    x = torch.tensor([[1.0]], dtype=dtype)
    # In bfloat16 1 + 1/512 is 1: added one by one in it, the small terms would vanish.
    y = run(x, np.array([[0] * 9]), torch.tensor([[1.0] + [2.0**-9] * 8]))
    assert y.dtype == dtype
    assert float(y) == 1.0 + 2.0**-6


def test_no_tokens():
    y = run(torch.empty(0, 4), np.empty((0, 2), dtype=np.int64), torch.empty(0, 2))
    assert y.shape == (0, 4)
