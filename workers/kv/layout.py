"""What one KV block holds, in bytes and dimensions; shared by the pool, the runner and the transfer.

Knows no tensors: sizes only. Two workers may exchange blocks if and only if their `compatibility` is equal; those of
groups of different widths do so slice by slice.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

from penstock.workers.transfer.head_slices import HeadShare

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int64": 8}


@dataclass(frozen=True, slots=True)
class KVLayout:
    """A block is one contiguous run of bytes with logical index `[layer, part, kv head, slot, dim]`.

    The parts are key and value, or one row that serves as both: then there is one head of the row's width, which every
    rank of a group holds whole (DeepSeek-V2, 2024, section 2.1.2).
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int  # tokens
    dtype: str  # a key of DTYPE_BYTES
    revision: str = ""  # of model weights, adapter and codec: blocks of different revisions never mix
    parts: int = 2  # 1: latent rows
    tensor_width: int = 1  # ranks of a group that share the model's KV heads
    tensor_rank: int = 0  # of them, whose blocks these are
    total_kv_heads: int = 0  # of the model; 0: all of them are here

    @property
    def token_bytes(self) -> int:
        """Bytes of KV that one token takes, over all layers."""
        return self.num_layers * self.parts * self.num_kv_heads * self.head_dim * DTYPE_BYTES[self.dtype]

    @property
    def block_bytes(self) -> int:
        """Bytes of one block."""
        return self.token_bytes * self.block_size

    @property
    def share(self) -> HeadShare:
        """Which of the model's KV heads are in these blocks."""
        return HeadShare(self.total_kv_heads or self.num_kv_heads, self.tensor_width, self.tensor_rank)

    @property
    def pieces(self) -> int:
        """Runs of bytes of a block, each with all of its heads."""
        return self.num_layers * self.parts

    @property
    def compatibility(self) -> str:
        """Hash that two workers compare before any block moves: of what all ranks of a group hold together."""
        whole = replace(
            self,
            num_kv_heads=self.total_kv_heads or self.num_kv_heads,
            tensor_width=1,
            tensor_rank=0,
            total_kv_heads=0,
        )
        return hashlib.sha256(repr(whole).encode()).hexdigest()[:32]

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)
