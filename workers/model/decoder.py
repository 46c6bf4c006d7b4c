"""The Llama family's decoder (Llama 2, 3, 3.1; Qwen3 adds a norm on query and key heads), over a paged KV cache.

Called by `workers/runner.py` once per step with all rows' tokens packed together. It does not know requests, blocks'
owners or sampling. One linear serves query, key and value, one gate and up.
Legend: T packed tokens, S wanted tokens, E hidden size, D head dim, Hq query heads, H kv heads, F feed-forward width,
V vocabulary, B blocks, L layers, C = 2 (key, value), P slots of a block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from penstock.kernels import ops
from penstock.kernels.packing import PackedWeight
from penstock.kernels.ragged import AttentionPlan
from penstock.workers.model.config import DecoderConfig


@dataclass(frozen=True, slots=True, eq=False)
class LayerWeights:
    """One decoder layer."""

    input_norm: Tensor  # [E]
    qkv: PackedWeight  # [(Hq + 2 H) D, E]: query heads, key heads, value heads
    qk_norm: Tensor | None  # [Hq + H, D] float32
    output: PackedWeight  # [E, Hq D]
    mlp_norm: Tensor  # [E]
    gate_up: PackedWeight  # [2 F, E]
    down: PackedWeight  # [E, F]


@dataclass(frozen=True, slots=True, eq=False)
class DecoderWeights:
    """The whole model."""

    embedding: Tensor  # [V, E]
    layers: tuple[LayerWeights, ...]
    final_norm: Tensor  # [E]
    head: PackedWeight  # [V, E]


class Decoder:
    """Weights and rotary tables; stateless between calls but for the KV blocks that it is handed."""

    def __init__(self, config: DecoderConfig, weights: DecoderWeights, rope: tuple[Tensor, Tensor]) -> None:
        self.config = config
        self._weights = weights
        self._cos, self._sin = rope
        self._scale = config.head_dim**-0.5

    def forward(
        self, token_ids: Tensor, positions: Tensor, kv_BLCHPD: Tensor, plan: AttentionPlan, wanted: Tensor
    ) -> Tensor:
        """See `DecoderModel.forward`."""
        config, layers = self.config, self._weights.layers
        angles = self._cos.index_select(0, positions), self._sin.index_select(0, positions)
        residual = F.embedding(token_ids, self._weights.embedding)
        hidden = ops.rms_norm(residual, layers[0].input_norm, config.rms_eps)
        for number, layer in enumerate(layers):
            attended = self._attend(number, layer, hidden, angles, kv_BLCHPD, plan)
            if number == len(layers) - 1:
                # Above the last keys and values only wanted tokens matter.
                if len(wanted) == 0:
                    return residual[:0]
                attended, residual = attended.index_select(0, wanted), residual.index_select(0, wanted)
            projected = ops.linear(attended, layer.output)
            hidden, residual = ops.add_rms_norm(projected, residual, layer.mlp_norm, config.rms_eps)
            expanded = ops.silu_and_mul(ops.linear(hidden, layer.gate_up))
            following = layers[number + 1].input_norm if number + 1 < len(layers) else self._weights.final_norm
            hidden, residual = ops.add_rms_norm(ops.linear(expanded, layer.down), residual, following, config.rms_eps)
        return hidden

    def logits(self, hidden_SE: Tensor) -> Tensor:
        """See `DecoderModel.logits`."""
        if len(hidden_SE) == 0:
            return torch.empty(0, self.config.vocab_size)
        return ops.linear(hidden_SE, self._weights.head).float()

    def _attend(
        self,
        number: int,
        layer: LayerWeights,
        hidden_TE: Tensor,
        angles: tuple[Tensor, Tensor],
        kv_BLCHPD: Tensor,
        plan: AttentionPlan,
    ) -> Tensor:
        """Attention before the output projection, [T, Hq D]. Norm and rotation of the heads run in float32."""
        config = self.config
        heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
        tokens = hidden_TE.shape[0]
        qkv = ops.linear(hidden_TE, layer.qkv).view(tokens, heads + 2 * kv_heads, dim)
        qk = qkv[:, : heads + kv_heads].float()
        if layer.qk_norm is not None:
            qk = ops.rms_norm(qk, layer.qk_norm, config.rms_eps)
        qkv[:, : heads + kv_heads] = ops.rotary(qk, *angles)
        ops.write_kv(kv_BLCHPD, number, qkv[:, heads:].view(tokens, 2, kv_heads, dim), plan)
        attended = ops.paged_attention(qkv[:, :heads], kv_BLCHPD, number, plan, self._scale)
        return attended.view(tokens, heads * dim)
