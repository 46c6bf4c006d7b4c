"""The digest of blocks that the host never sees: a sum of their numbers, each with a weight of its own, on the device.

Used by `lane_frames.py` at both ends; pure. A block is W numbers x of 64 bits (zeros behind its end), and its digest is
sum(w * x) modulo 2^64 with fixed odd weights w, so that any one number that differs is noticed for certain, and blocks
that differ anyhow, shifted or swapped ones included, with a probability of about 1 - 2^-63 for weights unknown to
whoever altered them (Carter and Wegman 1979: a multilinear family). It is for accidents, as the others are
(`digests.py`). Session and fragment are mixed in, so a block that belongs elsewhere is another's.
"""

from __future__ import annotations

import torch
from torch import Tensor
from xxhash import xxh3_64_intdigest

WEIGHTED = (1 << 32) - 1  # an offer's `checked` for this digest
_MASK = (1 << 64) - 1
_SEED = 0x70656E73746F636B


class WeightedDigest:
    """Digests of blocks of `block_bytes` on `device`."""

    def __init__(self, block_bytes: int, device: torch.device) -> None:
        self._padding = -block_bytes % 8
        draw = torch.Generator().manual_seed(_SEED)
        count = (block_bytes + self._padding) // 8
        self._weights = (torch.randint(-(1 << 62), 1 << 62, (count,), generator=draw) * 2 + 1).to(device)

    def of(self, frame: Tensor, session_id: bytes, fragments: list[int]) -> list[int]:
        """One per row of `frame`, uint8 [n, block_bytes]; waits for the device."""
        rows = torch.nn.functional.pad(frame, (0, self._padding)) if self._padding else frame
        sums: list[int] = (rows.view(torch.int64) * self._weights).sum(dim=1).tolist()
        named = [xxh3_64_intdigest(session_id, seed=fragment) for fragment in fragments]
        return [(number ^ name) & _MASK for number, name in zip(sums, named, strict=True)]
