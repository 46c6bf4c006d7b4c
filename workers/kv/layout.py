"""What one KV block holds, in bytes and dimensions; shared by the pool, the runner and the transfer.

Knows no tensors: sizes only. Two workers may exchange blocks if and only if their `compatibility` is equal.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int64": 8}


@dataclass(frozen=True, slots=True)
class KVLayout:
    """A block is one contiguous run of bytes with logical index `[layer, k/v, kv head, slot, dim]`."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int  # tokens
    dtype: str  # a key of DTYPE_BYTES
    revision: str = ""  # of model weights, adapter and codec: blocks of different revisions never mix

    @property
    def token_bytes(self) -> int:
        """Bytes of KV that one token takes, over all layers."""
        return self.num_layers * 2 * self.num_kv_heads * self.head_dim * DTYPE_BYTES[self.dtype]

    @property
    def block_bytes(self) -> int:
        """Bytes of one block."""
        return self.token_bytes * self.block_size

    @property
    def compatibility(self) -> str:
        """Hash that two workers compare before any block moves."""
        return hashlib.sha256(repr(self).encode()).hexdigest()[:32]

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)
