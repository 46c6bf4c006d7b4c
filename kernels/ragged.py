"""The shape of a ragged attention batch: what `ops.plan_attention` returns and the attention kernels read.

Made once per step by `plan_attention`, read once per layer by `write_kv` and `paged_attention`. Knows block numbers and
lengths, not whose they are. Legend: N rows, T tokens, B blocks, L layers, C = 2 (key, value), H kv heads, P slots of a
block, D head dim, W block-table width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

I32 = NDArray[np.int32]


@dataclass(frozen=True, slots=True, eq=False)
class RaggedBatch:
    """N rows of new tokens, packed: row i owns tokens `offsets[i]:offsets[i+1]` at positions `starts[i]...`."""

    starts: I32  # [N] tokens whose key and value are already stored
    offsets: I32  # [N + 1]
    block_tables: I32  # [N, W]

    @property
    def num_tokens(self) -> int:
        """T, the packed tokens of all rows."""
        return int(self.offsets[-1])

    @property
    def counts(self) -> I32:
        """[N] new tokens of each row."""
        return np.diff(self.offsets).astype(np.int32)


@dataclass(frozen=True, slots=True, eq=False)
class AttentionGroup:
    """Rows of similar shape that are computed as one padded batch of R rows, Q queries and S keys each.

    `gather` lists the [C, R, H, S / P] storage rows (one row = P slots x D of one block, layer 0, key or value, head).
    `tokens` places the queries in the packed batch; with padding, `padded` [R * Q] picks the (repeated) query of every
    padded place and `kept` the places that are real, in the order of `tokens`.
    """

    num_rows: int
    num_queries: int
    num_keys: int
    gather: Tensor
    tokens: slice | Tensor
    mask: Tensor | None  # additive, broadcastable to [R, heads, Q, S]; None = causal from position 0
    padded: Tensor | None = None
    kept: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class AttentionPlan:
    """A batch together with what a backend worked out about it in advance.

    `groups` is filled while the step runs: the first layer with a given window plans it for the others.
    """

    batch: RaggedBatch
    write_rows: Tensor  # [T * C * H] storage rows of D numbers in layer 0 that receive the new keys and values
    groups: dict[int, tuple[AttentionGroup, ...]]  # by window, 0 = all
