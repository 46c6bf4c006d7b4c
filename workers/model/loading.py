"""From a model directory to a decoder: which tensors a family has, how they are fused, and in which dtype they end up.

Called by `workers/runner.py` at start. Reads each tensor once from the mapped file straight into its fused place; tells
`progress` after each. Raises ModelError naming file and tensor.
Experts' tensors are read in either form that there is: one for each expert and projection under the family's own
names, as checkpoints are published and as transformers saves them; or one for all of a layer, as transformers holds
them and saves them when asked to.
Legend: E hidden size, D head dim, Hq query heads, H kv heads, F feed-forward width (of one expert), G = 2 F,
V vocabulary, X experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

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
)
from penstock.workers.model.expert_layers import ExpertLayers
from penstock.workers.model.rope import rope_tables
from penstock.workers.model.rope_fields import Rope

STACKED_BLOCK = "mlp."  # where a layer's experts are one tensor, whatever the family
STACKED_GATE_UP, STACKED_DOWN = "experts.gate_up_proj", "experts.down_proj"
Progress = Callable[[int, int], None]  # tensors read, tensors in all

CPU = torch.device("cpu")
TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_decoder(
    config: DecoderConfig,
    checkpoint: Checkpoint,
    dtype: str,
    num_positions: int,
    progress: Progress | None = None,
    device: torch.device = CPU,
) -> Decoder:
    """Load all weights in `dtype` onto `device`, with rotary tables for `num_positions`."""
    reader = _WeightReader(checkpoint, TORCH_DTYPES[dtype], _num_tensors(config, checkpoint), progress, device)
    hidden, vocab = config.hidden_size, config.vocab_size
    embedding = reader.fused(["model.embed_tokens.weight"], [(vocab, hidden)])
    layers = tuple(_load_layer(config, reader, number) for number in range(config.num_layers))
    final_norm = reader.norm("model.norm.weight", hidden, config.norm_offset)
    head = embedding if config.tied_embeddings else reader.fused(["lm_head.weight"], [(vocab, hidden)])
    weights = DecoderWeights(embedding, layers, final_norm, ops.pack_weight(head))
    return Decoder(config, weights, *decoder_ropes(config, num_positions, device))


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
    blocks = 0
    for number in range(config.num_layers):
        how = config.experts
        if how is None or not how.layers[number]:
            blocks += 3 + 3 * config.mlp_bias
        else:
            stacked = _stacked(checkpoint, _layer_prefix(number))
            blocks += 1 + (2 if stacked else 3 * how.count) + 4 * bool(how.shared_width)
    return 3 - config.tied_embeddings + config.num_layers * (norms + attention) + blocks


def _layer_prefix(number: int) -> str:
    return f"model.layers.{number}."


def _load_layer(config: DecoderConfig, reader: _WeightReader, number: int) -> LayerWeights:
    prefix, hidden, dim = _layer_prefix(number), config.hidden_size, config.head_dim
    heads, kv_heads = config.num_heads, config.num_kv_heads
    qkv = {"q_proj": heads * dim, "k_proj": kv_heads * dim, "v_proj": kv_heads * dim}
    attention = prefix + "self_attn."

    def norm(name: str) -> Tensor:
        return reader.norm(f"{prefix}{name}_layernorm.weight", hidden, config.norm_offset)

    return LayerWeights(
        input_norm=norm("input"),
        qkv=reader.linear(attention, qkv, hidden, config.qkv_bias),
        qk_norm=_load_qk_norm(config, reader, attention) if config.qk_norm else None,
        output=reader.linear(attention, {"o_proj": hidden}, heads * dim, config.output_bias),
        # With norms after the blocks, `post_attention` is one of those; without, it is the one before the second block.
        attended_norm=norm("post_attention") if config.post_norms else None,
        mlp_norm=norm("pre_feedforward" if config.post_norms else "post_attention"),
        mlp=_load_mlp(config, reader, number),
        expanded_norm=norm("post_feedforward") if config.post_norms else None,
    )


def _load_mlp(config: DecoderConfig, reader: _WeightReader, number: int) -> DenseMlp | ExpertMlp:
    prefix, hidden, how = _layer_prefix(number), config.hidden_size, config.experts
    if how is None or not how.layers[number]:
        return _load_dense(reader, prefix + "mlp.", hidden, config.intermediate_size, config.mlp_bias)
    stacked = _stacked(reader.checkpoint, prefix)
    block = prefix + (STACKED_BLOCK if stacked else how.names.block)
    router = reader.linear(block, {"gate": how.count}, hidden, with_bias=False)
    experts = (_load_stacked if stacked else _load_one_by_one)(how, reader, block, hidden)
    shared = None
    if how.shared_width:
        gate = reader.linear(block, {"shared_expert_gate": 1}, hidden, with_bias=False)
        shared = SharedExpert(gate, _load_dense(reader, block + "shared_expert.", hidden, how.shared_width, False))
    return ExpertMlp(router, experts, shared)


def _load_dense(reader: _WeightReader, prefix: str, hidden: int, width: int, with_bias: bool) -> DenseMlp:
    return DenseMlp(
        gate_up=reader.linear(prefix, {"gate_proj": width, "up_proj": width}, hidden, with_bias),
        down=reader.linear(prefix, {"down_proj": hidden}, width, with_bias),
    )


def _stacked(checkpoint: Checkpoint, prefix: str) -> bool:
    """Whether all experts of this layer are one tensor; either of the two says so, that the other be missed."""
    return any(prefix + STACKED_BLOCK + name in checkpoint for name in (STACKED_GATE_UP, STACKED_DOWN))


def _load_stacked(how: ExpertLayers, reader: _WeightReader, block: str, hidden: int) -> PackedExperts:
    gate_up_XGE = reader.fused([block + STACKED_GATE_UP], [(how.count, 2 * how.width, hidden)])
    return ops.pack_experts(gate_up_XGE, reader.fused([block + STACKED_DOWN], [(how.count, hidden, how.width)]))


def _load_one_by_one(how: ExpertLayers, reader: _WeightReader, block: str, hidden: int) -> PackedExperts:
    gate_up_XGE = reader.empty(how.count, 2 * how.width, hidden)
    down_XEF = reader.empty(how.count, hidden, how.width)
    for expert in range(how.count):
        own = f"{block}experts.{expert}."
        reader.copy(f"{own}{how.names.gate}.weight", gate_up_XGE[expert, : how.width])
        reader.copy(f"{own}{how.names.up}.weight", gate_up_XGE[expert, how.width :])
        reader.copy(f"{own}{how.names.down}.weight", down_XEF[expert])
    return ops.pack_experts(gate_up_XGE, down_XEF)


def _load_qk_norm(config: DecoderConfig, reader: _WeightReader, prefix: str) -> Tensor:
    """One row per query head, then per key head: [Hq + H, D] float32."""
    query, key = (
        reader.norm(f"{prefix}{name}_norm.weight", config.head_dim, config.norm_offset).float() for name in ("q", "k")
    )
    return torch.cat((query.expand(config.num_heads, -1), key.expand(config.num_kv_heads, -1)))


@dataclass(slots=True)
class _WeightReader:
    """Copies tensors out of the checkpoint and counts them."""

    checkpoint: Checkpoint
    dtype: torch.dtype
    total: int
    progress: Progress | None
    device: torch.device = CPU
    done: int = 0

    def fused(self, names: list[str], shapes: list[tuple[int, ...]]) -> Tensor:
        """The named tensors below each other, in the wanted dtype, in memory of their own."""
        out = self.empty(sum(shape[0] for shape in shapes), *shapes[0][1:])
        begin = 0
        for name, shape in zip(names, shapes, strict=True):
            self.copy(name, out[begin : begin + shape[0]])
            begin += shape[0]
        return out

    def empty(self, *shape: int) -> Tensor:
        """Room for weights, of the wanted dtype."""
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def copy(self, name: str, out: Tensor) -> None:
        """The named tensor, of the shape of `out`, into it."""
        out.copy_(self.checkpoint.read(name, tuple(out.shape)))
        self.done += 1
        if self.progress is not None:
            self.progress(self.done, self.total)

    def norm(self, name: str, size: int, offset: float) -> Tensor:
        """The named norm's weight [size]; float32 where an offset is added, which a narrow dtype would round away."""
        weight = self.fused([name], [(size,)])
        return weight.float().add_(offset) if offset else weight

    def linear(self, prefix: str, outputs: dict[str, int], inputs: int, with_bias: bool) -> PackedWeight:
        """The named projections as one packed linear."""
        weight = self.fused([f"{prefix}{name}.weight" for name in outputs], [(n, inputs) for n in outputs.values()])
        bias = None
        if with_bias:
            bias = self.fused([f"{prefix}{name}.bias" for name in outputs], [(n,) for n in outputs.values()])
        return ops.pack_weight(weight, bias)
