"""The decoder of the families in `families.py`, over a paged KV cache: Llama's, with what its config adds.

Each family's differences are data: windows and rotary embedding per layer, norms of query and key heads, norms after
the blocks, soft caps, the gate's activation, experts in place of a dense block, the embedding's scale. Called by
`workers/runner.py` once per step with all rows' tokens packed together. It does not know requests, blocks' owners or
sampling. One linear serves query, key and value, one gate and up.
Legend: T packed tokens, S wanted tokens, E hidden size, D head dim, Hq query heads, H kv heads, F feed-forward width,
V vocabulary, B blocks, L layers, C = 2 (key, value), P slots of a block, X experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from penstock.kernels import ops
from penstock.kernels.packing import PackedExperts, PackedWeight
from penstock.kernels.ragged import AttentionPlan
from penstock.workers.model.config import DecoderConfig

RopeTables = tuple[Tensor, Tensor]  # cosine and sine, each [positions or T, D / 2]
EXPERT_ACTIVATIONS = {"silu": "silu", "gelu_tanh": "gelu"}  # the config's name -> that of `ops.fused_moe`


@dataclass(frozen=True, slots=True, eq=False)
class DenseMlp:
    """The feed-forward block of a layer without experts."""

    gate_up: PackedWeight  # [2 F, E]
    down: PackedWeight  # [E, F]


@dataclass(frozen=True, slots=True, eq=False)
class SharedExpert:
    """An expert that serves every token, weighted by the sigmoid of its gate."""

    gate: PackedWeight  # [1, E]
    mlp: DenseMlp


@dataclass(frozen=True, slots=True, eq=False)
class ExpertMlp:
    """The feed-forward block of a layer with experts."""

    router: PackedWeight  # [X, E]
    experts: PackedExperts
    shared: SharedExpert | None


@dataclass(frozen=True, slots=True, eq=False)
class LayerWeights:
    """One decoder layer."""

    input_norm: Tensor  # [E]
    qkv: PackedWeight  # [(Hq + 2 H) D, E]: query heads, key heads, value heads
    qk_norm: Tensor | None  # [Hq + H, D] float32
    output: PackedWeight  # [E, Hq D]
    attended_norm: Tensor | None  # [E], after the output projection
    mlp_norm: Tensor  # [E]
    mlp: DenseMlp | ExpertMlp
    expanded_norm: Tensor | None  # [E], after the feed-forward block


@dataclass(frozen=True, slots=True, eq=False)
class DecoderWeights:
    """The whole model."""

    embedding: Tensor  # [V, E]
    layers: tuple[LayerWeights, ...]
    final_norm: Tensor  # [E]
    head: PackedWeight  # [V, E]


class Decoder:
    """Weights and rotary tables; stateless between calls but for the KV blocks that it is handed."""

    def __init__(
        self, config: DecoderConfig, weights: DecoderWeights, rope: RopeTables, local_rope: RopeTables | None
    ) -> None:
        """`local_rope` serves the layers with a window, where it is given; `rope` all others."""
        self.config = config
        self._weights = weights
        self._ropes = (rope,) if local_rope is None else (rope, local_rope)
        self._rope_of_layer = tuple(int(local_rope is not None and window > 0) for window in config.windows)
        self._gated = ops.gelu_and_mul if config.activation == "gelu_tanh" else ops.silu_and_mul
        # Rounded to the dtype in which it multiplies, as the reference implementations have it.
        self._embedding_scale = float(torch.tensor(config.embedding_scale).to(weights.embedding.dtype))

    def forward(
        self, token_ids: Tensor, positions: Tensor, kv_BLCHPD: Tensor, plan: AttentionPlan, wanted: Tensor
    ) -> Tensor:
        """See `DecoderModel.forward`."""
        eps, layers = self.config.rms_eps, self._weights.layers
        angles = [(cos.index_select(0, positions), sin.index_select(0, positions)) for cos, sin in self._ropes]
        residual = self._embed(token_ids)
        hidden = ops.rms_norm(residual, layers[0].input_norm, eps)
        for number, layer in enumerate(layers):
            attended = self._attend(number, hidden, angles[self._rope_of_layer[number]], kv_BLCHPD, plan)
            if number == len(layers) - 1:
                # Above the last keys and values only wanted tokens matter.
                if len(wanted) == 0:
                    return residual[:0]
                attended, residual = attended.index_select(0, wanted), residual.index_select(0, wanted)
            projected = ops.linear(attended, layer.output)
            if layer.attended_norm is not None:
                projected = ops.rms_norm(projected, layer.attended_norm, eps)
            hidden, residual = ops.add_rms_norm(projected, residual, layer.mlp_norm, eps)
            expanded = self._expand(hidden, layer.mlp)
            if layer.expanded_norm is not None:
                expanded = ops.rms_norm(expanded, layer.expanded_norm, eps)
            following = layers[number + 1].input_norm if number + 1 < len(layers) else self._weights.final_norm
            hidden, residual = ops.add_rms_norm(expanded, residual, following, eps)
        return hidden

    def logits(self, hidden_SE: Tensor) -> Tensor:
        """See `DecoderModel.logits`."""
        if len(hidden_SE) == 0:
            return torch.empty(0, self.config.vocab_size, device=hidden_SE.device)
        logits, cap = ops.linear(hidden_SE, self._weights.head).float(), self.config.logit_cap
        return logits.div_(cap).tanh_().mul_(cap) if cap else logits

    def _embed(self, token_ids: Tensor) -> Tensor:
        embedded = F.embedding(token_ids, self._weights.embedding)
        return embedded.mul_(self._embedding_scale) if self._embedding_scale != 1.0 else embedded

    def _expand(self, hidden_TE: Tensor, mlp: DenseMlp | ExpertMlp) -> Tensor:
        """The feed-forward block, [T, E]."""
        if isinstance(mlp, DenseMlp):
            return ops.linear(self._gated(ops.linear(hidden_TE, mlp.gate_up)), mlp.down)
        chosen = self._consult(hidden_TE, mlp)
        if mlp.shared is None:
            return chosen
        share = ops.linear(hidden_TE, mlp.shared.gate).sigmoid_()
        return chosen.add_(self._expand(hidden_TE, mlp.shared.mlp).mul_(share))

    def _consult(self, hidden_TE: Tensor, mlp: ExpertMlp) -> Tensor:
        """What each token's own experts say, [T, E]. Logits are of the model's dtype, probabilities float32."""
        how = self.config.experts
        if how is None:
            raise TypeError("weights with experts, but a configuration without")
        ids, weights = ops.route_experts(ops.linear(hidden_TE, mlp.router), how.top_k, renormalize=how.renormalize)
        return ops.fused_moe(hidden_TE, mlp.experts, ids, weights, EXPERT_ACTIVATIONS[self.config.activation])

    def _attend(
        self, number: int, hidden_TE: Tensor, angles: RopeTables, kv_BLCHPD: Tensor, plan: AttentionPlan
    ) -> Tensor:
        """Attention before the output projection, [T, Hq D]. Norm and rotation of the heads run in float32."""
        config, layer = self.config, self._weights.layers[number]
        heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
        tokens = hidden_TE.shape[0]
        qkv = ops.linear(hidden_TE, layer.qkv).view(tokens, heads + 2 * kv_heads, dim)
        q_THD = ops.rotate_and_store(qkv, layer.qk_norm, config.rms_eps, *angles, kv_BLCHPD, number, plan)
        attended = ops.paged_attention(
            q_THD,
            kv_BLCHPD,
            number,
            plan,
            config.attention_scale,
            window=config.windows[number],
            soft_cap=config.attention_cap,
        )
        return attended.view(tokens, heads * dim)
