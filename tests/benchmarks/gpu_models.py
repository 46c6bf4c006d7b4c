"""Shapes of well-known models with random weights made on the device: what `engine_gpu.py` runs, without any file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from benchmarks.gpu_limits import ModelSize

from penstock.workers.forward_pass import ModelShape
from penstock.workers.graphs.capture import Recorder
from penstock.workers.model.config import DecoderConfig, parse_config
from penstock.workers.model.loading import TORCH_DTYPES, load_decoder
from penstock.workers.model_build import model_layout, step_limits
from penstock.workers.runner import ModelRunner, RunnerParts
from penstock.workers.settings import SchedulerSettings

_QWEN3 = {"architectures": ["Qwen3ForCausalLM"], "rms_norm_eps": 1e-6, "rope_theta": 1e6, "hidden_act": "silu"}
_QWEN3_MOE = {**_QWEN3, "architectures": ["Qwen3MoeForCausalLM"]}
_LLAMA = {"architectures": ["LlamaForCausalLM"], "rms_norm_eps": 1e-5, "rope_theta": 5e5, "hidden_act": "silu"}


def _config(kind: dict[str, Any], sizes: tuple[int, ...], tied: bool, **more: Any) -> dict[str, Any]:
    names = (
        "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim vocab_size"
    )
    common = {"max_position_embeddings": 40960, "torch_dtype": "bfloat16", "tie_word_embeddings": tied}
    return {**kind, **dict(zip(names.split(), sizes, strict=True)), **common, **more}


_EXPERTS = {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True}
_EXPERTS |= {"decoder_sparse_step": 1, "mlp_only_layers": []}
_TOY_EXPERTS = {**_EXPERTS, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}

MODELS = {
    "qwen3-0.6b": _config(_QWEN3, (1024, 3072, 28, 16, 8, 128, 151936), tied=True),
    "llama-3.1-8b": _config(_LLAMA, (4096, 14336, 32, 32, 8, 128, 128256), tied=False),
    "qwen3-8b": _config(_QWEN3, (4096, 12288, 36, 32, 8, 128, 151936), tied=False),
    "qwen3-30b-a3b": _config(_QWEN3_MOE, (2048, 6144, 48, 32, 4, 128, 151936), tied=False, **_EXPERTS),
}
TOYS = {
    "qwen3-0.6b": _config(_QWEN3, (64, 96, 2, 4, 2, 16, 256), tied=True),
    "llama-3.1-8b": _config(_LLAMA, (64, 96, 2, 4, 2, 16, 256), tied=False),
    "qwen3-30b-a3b": _config(_QWEN3_MOE, (64, 96, 2, 4, 2, 16, 256), tied=False, **_TOY_EXPERTS),
}


def size_of(raw: dict[str, Any], kv_bytes: int = 2) -> ModelSize:
    """The numbers of the limit formulas."""
    hidden, heads, dim = raw["hidden_size"], raw["num_attention_heads"], raw["head_dim"]
    layers, kv_heads = raw["num_hidden_layers"], raw["num_key_value_heads"]
    attention = hidden * dim * (2 * heads + 2 * kv_heads)
    experts = raw.get("num_experts", 0)
    expert = 3 * hidden * raw["moe_intermediate_size"] if experts else 0
    mlp = experts * hidden if experts else 3 * hidden * raw["intermediate_size"]
    return ModelSize(
        layers=layers,
        hidden=hidden,
        query_heads=heads,
        head_dim=dim,
        vocab=raw["vocab_size"],
        dense=layers * (attention + mlp) + raw["vocab_size"] * hidden,
        kv_token_bytes=2 * layers * kv_heads * dim * kv_bytes,
        expert=expert,
        experts=experts,
        top_k=raw.get("num_experts_per_tok", 0) if experts else 0,
    )


@dataclass
class RandomCheckpoint:
    """Reads like a checkpoint; every tensor is drawn on the device, of the spread that trained weights have."""

    device: torch.device
    dtype: torch.dtype
    revision: str = "random"

    def __post_init__(self) -> None:
        self._generator = torch.Generator(self.device).manual_seed(0)

    def __contains__(self, name: str) -> bool:
        return True  # so that a layer's experts are drawn at once

    def read(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Norms are ones; a matrix has spread 1 / sqrt(inputs), so that activations neither grow nor vanish."""
        if len(shape) == 1:
            return torch.full(shape, float(name.endswith("norm.weight")), dtype=self.dtype, device=self.device)
        out = torch.empty(shape, dtype=self.dtype, device=self.device)
        return out.normal_(0.0, shape[-1] ** -0.5, generator=self._generator)

    def arriving(self, name: str, pieces: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
        """All is here at once. `name` as for `read`."""
        del name
        yield from pieces


def random_runner(
    raw: dict[str, Any], device: torch.device, scheduler: SchedulerSettings, recorder: Recorder | None
) -> ModelRunner:
    """A runner of this shape on the device. Raises ModelError for a shape that our decoder does not know."""
    config: DecoderConfig = parse_config(raw, "config.json")
    checkpoint: Any = RandomCheckpoint(device, TORCH_DTYPES[config.dtype])
    with torch.inference_mode():
        decoder = load_decoder(config, checkpoint, config.dtype, scheduler.max_model_len, None, device)
    block_size = 16
    return ModelRunner(
        RunnerParts(
            decoder=decoder,
            layout=model_layout(config, block_size, config.dtype, checkpoint.revision),
            vocab_size=config.vocab_size,
            limits=step_limits(scheduler, block_size),
            device=device,
            shape=ModelShape(config.num_heads, config.hidden_size),
            recorder=recorder,
        )
    )
