"""The shape of a ragged attention batch: what `ops.plan_attention` returns and the attention kernels read.

Made once per step by `plan_attention`, read once per layer by `write_kv` and `paged_attention`. Knows block numbers and
lengths, not whose they are. Legend: N rows, T tokens, B blocks, L layers, C = 2 (key, value), H kv heads, P slots of a
block, D head dim, W block-table width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

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
class AttentionPlan:
    """A batch; each backend's own plan adds what it worked out about it in advance. Only its maker may read that."""

    batch: RaggedBatch
