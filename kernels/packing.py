"""A weight matrix as the backend that will multiply with it wants it: what `ops.pack_weight` returns.

Made once at load, read by `ops.linear`. Only the backend that made one may read its `weight`.
Legend: K inputs, M outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class PackedWeight:
    """`weight` is [M, K], or an opaque tensor in the backend's own order when `rearranged`."""

    weight: Tensor
    bias: Tensor | None
    num_outputs: int
    num_inputs: int
    rearranged: bool
