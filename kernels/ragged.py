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

    @property
    def num_tokens(self) -> int:
        """The most tokens that may be given with this plan: the batch's, or with padding more."""
        return self.batch.num_tokens


@dataclass(frozen=True, slots=True)
class AttentionLimits:
    """The most that any step may hold that is planned into one workspace."""

    max_rows: int
    max_tokens: int
    max_length: int  # stored plus new tokens of one row
    query_heads: int
    padded: bool = False  # launches depend on these maxima alone, so that a captured graph can be replayed
    fixed_split: int = 0  # tokens of a KV chunk; above 0 a row's result does not depend on the rest of the batch
    shared_prefix: bool = True  # read blocks that several rows share once; fixed_split turns it off


@dataclass(frozen=True, slots=True, eq=False)
class AttentionWorkspace:
    """Memory at fixed addresses that plans are made in; each backend adds its own. Only its maker may read that."""

    limits: AttentionLimits
