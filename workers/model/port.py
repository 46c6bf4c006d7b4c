"""What a runner needs of a model: packed tokens in, hidden states and logits out, over paged KV blocks.

`decoder.py` (our own families) and `transformers_backend.py` (any other) implement it; `workers/runner.py` calls it.
Legend: T packed tokens, S wanted tokens, E hidden size, V vocabulary; B blocks, L layers, C = 2 (key, value), H kv
heads, P slots of a block, D head dim.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from penstock.kernels.ragged import AttentionPlan
from penstock.workers.lora.bank import StepAdapters


class KVExchange(Protocol):
    """Ranks that compute one prompt together (`parallel/context_parallel.py`)."""

    def share(self, kv_BLCHPD: Tensor, layer: int) -> None:
        """A rank has written its tokens' keys and values of this layer; on return it has all of the prompt's."""
        ...


class DecoderModel(Protocol):
    """Weights on one device; stateless between calls but for the KV blocks that it is handed.

    Ranks of a group make the same calls in the same order, each with its own KV blocks.
    """

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        kv_BLCHPD: Tensor,
        plan: AttentionPlan,
        wanted: Tensor,
        exchange: KVExchange | None = None,
        adapters: StepAdapters | None = None,
    ) -> Tensor:
        """Hidden states [S, E] after the final norm, of the packed tokens listed in `wanted` [S].

        Writes all T tokens' KV. `token_ids` and `positions` are [T] int64. May skip what only other tokens' outputs
        would need. `exchange` is asked in every layer between the writing of keys and values and attention.
        `adapters` only for a model that was built with room for them.
        """
        ...

    def logits(self, hidden_SE: Tensor) -> Tensor | None:
        """Logits [S, V] float32 of hidden states that `forward` gave; None on ranks of a group other than 0."""
        ...
