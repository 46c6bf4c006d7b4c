"""The decoder of the families in `families.py`, over a paged KV cache: Llama's, with what its config adds.

Each family's differences are data: windows and rotary embedding per layer, norms of query and key heads, norms after
the blocks, soft caps, the gate's activation, experts in place of a dense block, the embedding's scale. Called by
`workers/runner.py` once per step with all rows' tokens packed together. It does not know requests, blocks' owners or
sampling. One linear serves query, key and value, one gate and up. A rank of a group holds the part of every weight that
`parallel/shards.py` tells, and ranks add up their terms after each block (Shoeybi et al. 2019, "Megatron-LM", section
3); what is said below of heads, widths and vocabulary is the rank's.
Legend: T packed tokens, S wanted tokens, E hidden size, D head dim, Hq query heads, H kv heads, F feed-forward width,
V vocabulary, B blocks, L layers, C = 2 (key, value), P slots of a block, X experts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from penstock.kernels import ops
from penstock.kernels.packing import PackedExperts, PackedWeight
from penstock.kernels.ragged import AttentionPlan
from penstock.workers.lora.bank import StepAdapters
from penstock.workers.model.config import DecoderConfig
from penstock.workers.model.latent_attention import LatentProjections, attend_latent
from penstock.workers.model.latent_prefill import LatentPrefill, rows_to_expand
from penstock.workers.model.port import KVExchange
from penstock.workers.parallel.collectives import Alone, Collectives
from penstock.workers.parallel.shards import TensorShard

ALONE = Alone()
Adapt = Callable[[tuple[str, ...], Tensor, Tensor], None]  # `StepAdapters.add` of one layer
RopeTables = tuple[Tensor, Tensor]  # cosine and sine, each [positions or T, D / 2]
EXPERT_ACTIVATIONS = {"silu": "silu", "gelu_tanh": "gelu"}  # the config's name -> that of `ops.fused_moe`


@dataclass(frozen=True, slots=True, eq=False)
class DenseMlp:
    """The feed-forward block of a layer without experts."""

    gate_up: PackedWeight  # [2 F, E]
    down: PackedWeight  # [E, F]


@dataclass(frozen=True, slots=True, eq=False)
class SharedExpert:
    """An expert that serves every token, weighted by the sigmoid of its gate where it has one."""

    gate: PackedWeight | None  # [1, E]
    mlp: DenseMlp


@dataclass(frozen=True, slots=True, eq=False)
class ExpertMlp:
    """The feed-forward block of a layer with experts."""

    number: int  # among the layers with experts
    router: PackedWeight  # [X, E]
    experts: PackedExperts | None  # None: the ranks that `Decoder.spread` speaks for have them
    shared: SharedExpert | None
    selection_bias: Tensor | None = None  # [X] float32


@dataclass(frozen=True, slots=True, eq=False)
class LayerWeights:
    """One decoder layer."""

    input_norm: Tensor  # [E]
    qkv: PackedWeight | LatentProjections  # [(Hq + 2 H) D, E]: query heads, key heads, value heads
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


class SpreadExperts(Protocol):
    """Experts that several ranks hold (`parallel/expert_parallel.py`). All ranks call it, layer by layer."""

    def forward(self, layer: int, x_TK: Tensor, ids_Tk: Tensor, weights_Tk: Tensor, activation: str = "silu") -> Tensor:
        """`ops.fused_moe` over all experts of a layer (numbered among those with experts), [T, K]; T may be 0."""
        ...


class Decoder:
    """Weights and rotary tables; stateless between calls but for the KV blocks that it is handed."""

    def __init__(
        self,
        config: DecoderConfig,
        weights: DecoderWeights,
        rope: RopeTables,
        local_rope: RopeTables | None,
        group: Collectives = ALONE,
        spread: SpreadExperts | None = None,
    ) -> None:
        """`config` is the whole model's. `local_rope` serves the layers with a window, where given; `rope` others."""
        self.config = config
        self._group = group
        self._spread = spread
        shard = TensorShard(group.rank, group.width)
        self._heads, self._kv_heads = len(shard.heads(config.num_heads)), len(shard.kv_heads(config.num_kv_heads))
        self._token_ids = shard.vocabulary(config.vocab_size)
        self._weights = weights
        self._ropes = (rope,) if local_rope is None else (rope, local_rope)
        self._rope_of_layer = tuple(int(local_rope is not None and window > 0) for window in config.windows)
        self._gated = ops.gelu_and_mul if config.activation == "gelu_tanh" else ops.silu_and_mul
        # Rounded to the dtype in which it multiplies, as the reference implementations have it.
        self._embedding_scale = float(torch.tensor(config.embedding_scale).to(weights.embedding.dtype))

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
        """See `DecoderModel.forward`."""
        eps, layers = self.config.rms_eps, self._weights.layers
        angles = [(cos.index_select(0, positions), sin.index_select(0, positions)) for cos, sin in self._ropes]
        prefill = self._latent_prefill(kv_BLCHPD, plan)
        residual = self._embed(token_ids)
        hidden = ops.rms_norm(residual, layers[0].input_norm, eps)
        for number, layer in enumerate(layers):
            turned = angles[self._rope_of_layer[number]]
            attended = self._attend(number, hidden, turned, kv_BLCHPD, plan, exchange, prefill, adapters)
            last = number == len(layers) - 1
            if last:
                # Above the last keys and values only wanted tokens matter.
                if len(wanted) == 0 and self._spread is None:  # else others' tokens may need the experts here
                    return residual[:0]
                attended, residual = attended.index_select(0, wanted), residual.index_select(0, wanted)
            projected = ops.linear(attended, layer.output)
            adapt = None if adapters is None else functools.partial(adapters.add, number, wanted=last)
            if adapt is not None:
                adapt(("o_proj",), projected, attended)
            projected = self._group.all_reduce(projected)
            if layer.attended_norm is not None:
                projected = ops.rms_norm(projected, layer.attended_norm, eps)
            hidden, residual = ops.add_rms_norm(projected, residual, layer.mlp_norm, eps)
            expanded = self._group.all_reduce(self._expand(hidden, layer.mlp, adapt))
            if layer.expanded_norm is not None:
                expanded = ops.rms_norm(expanded, layer.expanded_norm, eps)
            following = layers[number + 1].input_norm if number + 1 < len(layers) else self._weights.final_norm
            hidden, residual = ops.add_rms_norm(expanded, residual, following, eps)
        return hidden

    def logits(self, hidden_SE: Tensor) -> Tensor | None:
        """See `DecoderModel.logits`."""
        if len(hidden_SE) == 0:
            return torch.empty(0, self.config.vocab_size, device=hidden_SE.device) if self._group.rank == 0 else None
        gathered = self._group.gather_columns(ops.linear(hidden_SE, self._weights.head))
        if gathered is None:
            return None
        logits, cap = gathered[:, : self.config.vocab_size].float().contiguous(), self.config.logit_cap
        return logits.div_(cap).tanh_().mul_(cap) if cap else logits

    def _latent_prefill(self, kv_BLCHPD: Tensor, plan: AttentionPlan) -> LatentPrefill | None:
        """For the rows of this step that attend to keys and values made of latent rows; None where none does."""
        shape = self.config.latent
        if shape is None or plan.num_tokens == len(plan.batch.starts):  # every row is a decode's
            return None
        chosen = rows_to_expand(plan.batch, shape)
        return LatentPrefill(kv_BLCHPD, plan.batch, chosen, shape, self._heads) if chosen.any() else None

    def _embed(self, token_ids: Tensor) -> Tensor:
        if self._group.width == 1:
            embedded = F.embedding(token_ids, self._weights.embedding)
        else:  # one rank has a token's row, the others add zeros
            others = (token_ids < self._token_ids.start) | (token_ids >= self._token_ids.stop)
            rows = (token_ids - self._token_ids.start).masked_fill_(others, 0)
            embedded = F.embedding(rows, self._weights.embedding).masked_fill_(others[:, None], 0)
            embedded = self._group.all_reduce(embedded)
        return embedded.mul_(self._embedding_scale) if self._embedding_scale != 1.0 else embedded

    def _expand(self, hidden_TE: Tensor, mlp: DenseMlp | ExpertMlp, adapt: Adapt | None = None) -> Tensor:
        """The feed-forward block, or the rank's term of it, [T, E]. Experts are not adapted."""
        if isinstance(mlp, DenseMlp):
            gate_up = ops.linear(hidden_TE, mlp.gate_up)
            if adapt is not None:
                adapt(("gate_proj", "up_proj"), gate_up, hidden_TE)
            gated = self._gated(gate_up)
            expanded = ops.linear(gated, mlp.down)
            if adapt is not None:
                adapt(("down_proj",), expanded, gated)
            return expanded
        chosen = self._consult(hidden_TE, mlp)
        if mlp.shared is None:
            return chosen
        common = self._expand(hidden_TE, mlp.shared.mlp)
        if mlp.shared.gate is not None:
            common.mul_(ops.linear(hidden_TE, mlp.shared.gate).sigmoid_())
        return chosen.add_(common)

    def _consult(self, hidden_TE: Tensor, mlp: ExpertMlp) -> Tensor:
        """What each token's own experts say, [T, E]. Logits are of the router's dtype, probabilities float32."""
        how = self.config.experts
        if how is None:
            raise TypeError("weights with experts, but a configuration without")
        ids, weights = ops.route_experts(
            ops.linear(hidden_TE.float() if how.exact_router else hidden_TE, mlp.router),
            how.top_k,
            scoring=how.scoring,
            renormalize=how.renormalize,
            selection_bias=mlp.selection_bias,
            groups=how.groups,
            top_groups=how.top_groups,
            scaling=how.scaling,
        )
        activation = EXPERT_ACTIVATIONS[self.config.activation]
        if mlp.experts is not None:
            return ops.fused_moe(hidden_TE, mlp.experts, ids, weights, activation)
        if self._spread is None:
            raise TypeError("a layer without its experts, and nobody who has them")
        return self._spread.forward(mlp.number, hidden_TE, ids, weights, activation)

    def _attend(
        self,
        number: int,
        hidden_TE: Tensor,
        angles: RopeTables,
        kv_BLCHPD: Tensor,
        plan: AttentionPlan,
        exchange: KVExchange | None,
        prefill: LatentPrefill | None,
        adapters: StepAdapters | None,
    ) -> Tensor:
        """Attention before the output projection, [T, Hq D]. Norm and rotation of the heads run in float32."""
        config, layer = self.config, self._weights.layers[number]
        if isinstance(layer.qkv, LatentProjections):
            return attend_latent(
                layer.qkv, hidden_TE, angles, kv_BLCHPD, number, plan, config.attention_scale, exchange, prefill
            )
        heads, kv_heads, dim = self._heads, self._kv_heads, config.head_dim
        tokens = hidden_TE.shape[0]
        flat = ops.linear(hidden_TE, layer.qkv)
        if adapters is not None:
            adapters.add(number, ("q_proj", "k_proj", "v_proj"), flat, hidden_TE)
        qkv = flat.view(tokens, heads + 2 * kv_heads, dim)
        q_THD = ops.rotate_and_store(qkv, layer.qk_norm, config.rms_eps, *angles, kv_BLCHPD, number, plan)
        if exchange is not None:
            exchange.share(kv_BLCHPD, number)
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
