"""Sends rows to the ranks that hold their experts, has them computed there, and brings the results home.

Called by `expert_parallel.py` once per expert layer and step, on every rank alike, also by one without tokens. The
collectives carry real counts; rows that a rank computes for its own tokens never enter them. It does not know where
experts lie or why: a `RowSplit` says it all.

Results do not depend on the split: a row's product is the same on every rank, and each token's terms are added at home
in the order of its experts, in float32.
Legend: T tokens of this rank, k experts of a token, K features, R ranks of the whole group.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from penstock.workers.parallel.collectives import Collectives
from penstock.workers.parallel.expert_dispatch import RowSplit

I64 = NDArray[np.int64]

# (rows [N, K], the expert of each row [N]) -> [N, K]
ExpertCompute = Callable[[Tensor, I64], Tensor]


class ExpertExchange:
    """One rank's side of dispatch and combine over a group whose ranks are `members` of the whole one."""

    def __init__(self, collectives: Collectives, members: tuple[int, ...]) -> None:
        """`members` are numbers in the whole group, ascending, one per rank of `collectives`."""
        self._collectives = collectives
        self._members = list(members)
        self._rank = members[collectives.rank]

    def run(self, x_TK: Tensor, ids_Tk: I64, weights_Tk: Tensor, split: RowSplit, compute: ExpertCompute) -> Tensor:
        """y[t] = sum_j weights[t, j] expert(ids[t, j])(x[t]), [T, K] of x's dtype; an id of -1 adds nothing."""
        tokens, chosen = ids_Tk.shape
        order = split.departure(self._rank, ids_Tk.reshape(-1))
        rows = torch.from_numpy(order).to(x_TK.device)
        sent, received = (counts[self._members].tolist() for counts in self._counts(split))
        leaving = sum(sent)
        departing = x_TK[rows // chosen]
        arrived = self._collectives.all_to_all(departing[:leaving], sent, received)
        mine = torch.cat([arrived, departing[leaving:]])
        terms = compute(mine, split.arriving_experts(self._rank))
        home = self._collectives.all_to_all(terms[: sum(received)], received, sent)
        own = torch.cat([home, terms[sum(received) :]])
        # Whatever the gate of no expert says, even NaN, it adds nothing.
        weights = weights_Tk.masked_fill(torch.from_numpy(ids_Tk < 0).to(x_TK.device), 0.0)
        return _combine(own, rows, weights, tokens, chosen)

    def _counts(self, split: RowSplit) -> tuple[I64, I64]:
        return split.sent(self._rank), split.received(self._rank)


def _combine(terms_NK: Tensor, rows_N: Tensor, weights_Tk: Tensor, tokens: int, chosen: int) -> Tensor:
    """Each token's terms times their weights, added one after the other in the order of its experts."""
    features = terms_NK.shape[1]
    placed = terms_NK.new_zeros(tokens * chosen, features, dtype=torch.promote_types(terms_NK.dtype, torch.float32))
    placed[rows_N] = terms_NK.to(placed.dtype)
    terms = placed.view(tokens, chosen, features)
    weights = weights_Tk.to(placed.dtype)
    total = placed.new_zeros(tokens, features)
    for place in range(chosen):
        # One rounding per term where the machine multiplies and adds at once, as the kernels do.
        total = torch.addcmul(total, terms[:, place], weights[:, place, None])
    return total.to(terms_NK.dtype)
