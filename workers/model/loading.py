"""From a model directory to a decoder: which tensors a family has, how they are fused, and in which dtype they end up.

Called by `workers/runner.py` at start. Reads each tensor once from the mapped file straight into its fused place; tells
`progress` after each. Raises ModelError naming file and tensor.
Legend: E hidden size, D head dim, Hq query heads, H kv heads, F feed-forward width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from penstock.kernels import ops
from penstock.kernels.packing import PackedWeight
from penstock.workers.model.checkpoint import Checkpoint
from penstock.workers.model.config import DecoderConfig
from penstock.workers.model.decoder import Decoder, DecoderWeights, LayerWeights
from penstock.workers.model.rope import rope_tables

Progress = Callable[[int, int], None]  # tensors read, tensors in all

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_decoder(
    config: DecoderConfig, checkpoint: Checkpoint, dtype: str, num_positions: int, progress: Progress | None = None
) -> Decoder:
    """Load all weights in `dtype`, with rotary tables for `num_positions`."""
    reader = _WeightReader(checkpoint, TORCH_DTYPES[dtype], _num_tensors(config), progress)
    hidden, vocab = config.hidden_size, config.vocab_size
    embedding = reader.fused(["model.embed_tokens.weight"], [(vocab, hidden)])
    layers = tuple(_load_layer(config, reader, f"model.layers.{number}.") for number in range(config.num_layers))
    final_norm = reader.norm("model.norm.weight", hidden, config.norm_offset)
    head = embedding if config.tied_embeddings else reader.fused(["lm_head.weight"], [(vocab, hidden)])
    weights = DecoderWeights(embedding, layers, final_norm, ops.pack_weight(head))
    rope = rope_tables(config.rope, config.head_dim, num_positions)
    local = None
    if config.local_rope is not None:
        local = rope_tables(config.local_rope, config.head_dim, num_positions)
    return Decoder(config, weights, rope, local)


def _num_tensors(config: DecoderConfig) -> int:
    norms = 2 + 2 * config.qk_norm + 2 * config.post_norms
    biases = 3 * config.qkv_bias + config.output_bias + 3 * config.mlp_bias
    return 3 - config.tied_embeddings + config.num_layers * (7 + norms + biases)


def _load_layer(config: DecoderConfig, reader: _WeightReader, prefix: str) -> LayerWeights:
    hidden, width, dim = config.hidden_size, config.intermediate_size, config.head_dim
    heads, kv_heads = config.num_heads, config.num_kv_heads
    qkv = {"q_proj": heads * dim, "k_proj": kv_heads * dim, "v_proj": kv_heads * dim}
    attention, mlp = prefix + "self_attn.", prefix + "mlp."

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
        gate_up=reader.linear(mlp, {"gate_proj": width, "up_proj": width}, hidden, config.mlp_bias),
        down=reader.linear(mlp, {"down_proj": hidden}, width, config.mlp_bias),
        expanded_norm=norm("post_feedforward") if config.post_norms else None,
    )


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
    done: int = 0

    def fused(self, names: list[str], shapes: list[tuple[int, ...]]) -> Tensor:
        """The named tensors below each other, in the wanted dtype, in memory of their own."""
        rows = sum(shape[0] for shape in shapes)
        out = torch.empty((rows, *shapes[0][1:]), dtype=self.dtype)
        begin = 0
        for name, shape in zip(names, shapes, strict=True):
            out[begin : begin + shape[0]] = self.checkpoint.read(name, shape)
            begin += shape[0]
            self.done += 1
            if self.progress is not None:
                self.progress(self.done, self.total)
        return out

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
