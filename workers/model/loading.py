"""From a model directory to a decoder: which tensors a family has, how they are fused, and in which dtype they end up.

Called by `workers/model_build.py` at start. Of each tensor the rank's part goes from the mapped file straight into its
fused place (`weight_reader.py`); `progress` hears of each. Raises ModelError naming file and tensor.
Experts' tensors are read in either form that there is: one for each expert and projection under the family's own
names, as checkpoints are published and as transformers saves them; or one for all of a layer, as transformers holds
them and saves them when asked to.
Legend: E hidden size, D head dim, Hq query heads, H kv heads, F feed-forward width (of one expert), G = 2 F,
V vocabulary, X experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from penstock.kernels import ops
from penstock.kernels.packing import PackedExperts, PackedWeight
from penstock.workers.model.checkpoint import Checkpoint
from penstock.workers.model.config import DecoderConfig
from penstock.workers.model.decoder import (
    Decoder,
    DecoderWeights,
    DenseMlp,
    ExpertMlp,
    LayerWeights,
    RopeTables,
    SharedExpert,
    SpreadExperts,
)
from penstock.workers.model.expert_layers import ExpertLayers
from penstock.workers.model.latent_loading import load_latent, num_latent_tensors
from penstock.workers.model.rope import rope_tables
from penstock.workers.model.rope_fields import Rope
from penstock.workers.model.weight_reader import Cut, Progress, WeightReader
from penstock.workers.parallel.collectives import Alone, Collectives
from penstock.workers.parallel.shards import TensorShard

STACKED_BLOCK = "mlp."  # where a layer's experts are one tensor, whatever the family
STACKED_GATE_UP, STACKED_DOWN = "experts.gate_up_proj", "experts.down_proj"
CPU = torch.device("cpu")
ALONE = Alone()
TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_decoder(
    config: DecoderConfig,
    checkpoint: Checkpoint,
    dtype: str,
    num_positions: int,
    progress: Progress | None = None,
    device: torch.device = CPU,
    group: Collectives = ALONE,
    spread: SpreadExperts | None = None,
) -> Decoder:
    """Load the rank's weights in `dtype` onto `device`, with rotary tables for `num_positions`.

    Experts are left out where they are `spread` over several ranks.
    """
    total = _num_tensors(config, checkpoint)
    shard = TensorShard(group.rank, group.width)
    reader = WeightReader(checkpoint, TORCH_DTYPES[dtype], total, progress, device, shard)
    embedding = _load_embedding(config, reader)
    head = ops.pack_weight(embedding) if config.tied_embeddings else _load_head(config, reader)
    layers = tuple(_load_layer(config, reader, number, spread) for number in range(config.num_layers))
    final_norm = reader.norm("model.norm.weight", config.hidden_size, config.norm_offset)
    weights = DecoderWeights(embedding, layers, final_norm, head)
    return Decoder(config, weights, *decoder_ropes(config, num_positions, device), group, spread)


def _load_embedding(config: DecoderConfig, reader: WeightReader) -> Tensor:
    """The rank's rows, and zeros for those beyond the vocabulary."""
    own = Cut(config.vocab_size, reader.shard.vocabulary(config.vocab_size))
    rows = reader.empty(reader.shard.vocabulary_size(config.vocab_size), config.hidden_size)
    rows[len(own) :] = 0
    reader.copy("model.embed_tokens.weight", rows[: len(own)], (own, Cut.whole(config.hidden_size)))
    return rows


def _load_head(config: DecoderConfig, reader: WeightReader) -> PackedWeight:
    """The same of a head that is not the embedding."""
    own = Cut(config.vocab_size, reader.shard.vocabulary(config.vocab_size))
    size = reader.shard.vocabulary_size(config.vocab_size)
    packing = reader.packing(size, config.hidden_size)
    reader.put("lm_head.weight", (own, Cut.whole(config.hidden_size)), packing.rows)
    packing.rows.put(reader.empty(size - len(own), config.hidden_size).zero_())
    return packing.finish()


def decoder_ropes(
    config: DecoderConfig, num_positions: int, device: torch.device = CPU
) -> tuple[RopeTables, RopeTables | None]:
    """The rotary tables of most layers, and those of layers with a window where they differ; equal on every device."""

    def placed(rope: Rope) -> RopeTables:
        cos, sin = rope_tables(rope, config.head_dim, num_positions)
        return cos.to(device), sin.to(device)

    return placed(config.rope), None if config.local_rope is None else placed(config.local_rope)


def _num_tensors(config: DecoderConfig, checkpoint: Checkpoint) -> int:
    norms = 2 + 2 * config.qk_norm + 2 * config.post_norms
    attention = 4 + 3 * config.qkv_bias + config.output_bias
    if config.latent is not None:
        attention = 1 + num_latent_tensors(config.latent, config.qkv_bias) + config.output_bias
    blocks = 0
    for number in range(config.num_layers):
        how = config.experts
        if how is None or not how.layers[number]:
            blocks += 3 + 3 * config.mlp_bias
        else:
            stacked = stacked_experts(checkpoint, layer_prefix(number))
            shared = 3 + how.shared_gate + 3 * how.shared_bias if how.shared_width else 0
            blocks += 1 + (2 if stacked else 3 * how.count) + shared + how.selection_bias
    return 3 - config.tied_embeddings + config.num_layers * (norms + attention) + blocks


def layer_prefix(number: int) -> str:
    """Of the names of a layer's tensors."""
    return f"model.layers.{number}."


def _load_layer(config: DecoderConfig, reader: WeightReader, number: int, spread: SpreadExperts | None) -> LayerWeights:
    prefix, hidden, dim = layer_prefix(number), config.hidden_size, config.head_dim
    own_heads = Cut(config.num_heads, reader.shard.heads(config.num_heads))
    heads = own_heads.heads(dim)
    kv_heads = Cut(config.num_kv_heads, reader.shard.kv_heads(config.num_kv_heads)).heads(dim)
    qkv = {"q_proj": heads, "k_proj": kv_heads, "v_proj": kv_heads}
    attention, latent = prefix + "self_attn.", config.latent

    def norm(name: str) -> Tensor:
        return reader.norm(f"{prefix}{name}_layernorm.weight", hidden, config.norm_offset)

    return LayerWeights(
        input_norm=norm("input"),
        qkv=reader.column_linear(attention, qkv, hidden, config.qkv_bias)
        if latent is None
        else load_latent(config, latent, reader, attention),
        qk_norm=_load_qk_norm(config, reader, attention) if config.qk_norm else None,
        output=reader.row_linear(
            attention + "o_proj",
            hidden,
            heads if latent is None else own_heads.heads(latent.value_dim),
            config.output_bias,
        ),
        # With norms after the blocks, `post_attention` is one of those; without, it is the one before the second block.
        attended_norm=norm("post_attention") if config.post_norms else None,
        mlp_norm=norm("pre_feedforward" if config.post_norms else "post_attention"),
        mlp=_load_mlp(config, reader, number, spread),
        expanded_norm=norm("post_feedforward") if config.post_norms else None,
    )


def _load_mlp(
    config: DecoderConfig, reader: WeightReader, number: int, spread: SpreadExperts | None
) -> DenseMlp | ExpertMlp:
    prefix, hidden, how = layer_prefix(number), config.hidden_size, config.experts
    if how is None or not how.layers[number]:
        return _load_dense(reader, prefix + "mlp.", hidden, config.intermediate_size, config.mlp_bias)
    stacked = stacked_experts(reader.checkpoint, prefix)
    block = prefix + (STACKED_BLOCK if stacked else how.names.block)
    router, bias = _load_router(how, reader, block, hidden)
    experts = None
    if spread is None:
        experts = (_load_stacked if stacked else _load_one_by_one)(how, reader, block, hidden)
    else:
        reader.count(2 if stacked else 3 * how.count)
    return ExpertMlp(sum(how.layers[:number]), router, experts, _load_shared(how, reader, block, hidden), bias)


def _load_router(
    how: ExpertLayers, reader: WeightReader, block: str, hidden: int
) -> tuple[PackedWeight, Tensor | None]:
    """The router, and what is added to its scores for the choice."""
    if not how.exact_router:
        return reader.linear(block, {"gate": how.count}, hidden, with_bias=False), None
    router = ops.pack_weight(reader.fused([f"{block}gate.weight"], [(how.count, hidden)]).float())
    if not how.selection_bias:
        return router, None
    bias = torch.empty(how.count, dtype=torch.float32, device=reader.device)
    reader.copy(f"{block}gate.e_score_correction_bias", bias)
    return router, bias


def _load_shared(how: ExpertLayers, reader: WeightReader, block: str, hidden: int) -> SharedExpert | None:
    if not how.shared_width:
        return None
    if not how.shared_gate:
        mlp = _load_dense(reader, block + "shared_experts.", hidden, how.shared_width, how.shared_bias)
        return SharedExpert(None, mlp)
    gate = reader.linear(block, {"shared_expert_gate": 1}, hidden, with_bias=False)
    return SharedExpert(gate, _load_dense(reader, block + "shared_expert.", hidden, how.shared_width, False))


def _load_dense(reader: WeightReader, prefix: str, hidden: int, width: int, with_bias: bool) -> DenseMlp:
    columns = Cut(width, reader.shard.columns(width))
    return DenseMlp(
        gate_up=reader.column_linear(prefix, {"gate_proj": columns, "up_proj": columns}, hidden, with_bias),
        down=reader.row_linear(prefix + "down_proj", hidden, columns, with_bias),
    )


def stacked_experts(checkpoint: Checkpoint, prefix: str) -> bool:
    """Whether all experts of this layer are one tensor; either of the two says so, that the other be missed."""
    return any(prefix + STACKED_BLOCK + name in checkpoint for name in (STACKED_GATE_UP, STACKED_DOWN))


def _load_stacked(how: ExpertLayers, reader: WeightReader, block: str, hidden: int) -> PackedExperts:
    own, count = reader.shard.columns(how.width), how.count
    packing = reader.packing_experts(count, len(own), hidden)
    gate_up_XGE = reader.view(block + STACKED_GATE_UP, (count, 2 * how.width, hidden))
    down_XEF = reader.view(block + STACKED_DOWN, (count, hidden, how.width))
    for expert in range(count):
        rows = packing.gate_up(expert)
        for first in (0, how.width):  # gate, then up
            part = gate_up_XGE[expert, own.start + first : own.stop + first]
            reader.put_rows(block + STACKED_GATE_UP, part, rows)
        rows.flush()
        rows = packing.down(expert)
        reader.put_rows(block + STACKED_DOWN, down_XEF[expert, :, own.start : own.stop], rows)
        rows.flush()
    reader.count(2)
    return packing.finish()


def _load_one_by_one(how: ExpertLayers, reader: WeightReader, block: str, hidden: int) -> PackedExperts:
    inputs, columns = Cut.whole(hidden), Cut(how.width, reader.shard.columns(how.width))
    packing = reader.packing_experts(how.count, len(columns), hidden)
    for expert in range(how.count):
        own, rows = f"{block}experts.{expert}.", packing.gate_up(expert)
        reader.put(f"{own}{how.names.gate}.weight", (columns, inputs), rows)
        reader.put(f"{own}{how.names.up}.weight", (columns, inputs), rows)
        rows.flush()
        rows = packing.down(expert)
        reader.put(f"{own}{how.names.down}.weight", (inputs, columns), rows)
        rows.flush()
    return packing.finish()


def _load_qk_norm(config: DecoderConfig, reader: WeightReader, prefix: str) -> Tensor:
    """One row per query head, then per key head, of the rank's: [Hq + H, D] float32."""
    heads, kv_heads = reader.shard.heads(config.num_heads), reader.shard.kv_heads(config.num_kv_heads)
    query, key = (
        reader.norm(f"{prefix}{name}_norm.weight", config.head_dim, config.norm_offset).float() for name in ("q", "k")
    )
    return torch.cat((query.expand(len(heads), -1), key.expand(len(kv_heads), -1)))
