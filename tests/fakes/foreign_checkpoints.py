"""Small random checkpoints of architectures that Penstock has no decoder for, made with transformers.

`NAMED` and `MORE` are those that the transformers backend serves, `REFUSED` those that it must not, with the reason.
The shapes are small but odd on purpose: grouped heads, partial rotation, windows shorter than the prompts, keys and
values of different sizes, biases and norms away from 0 and 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from fakes.exactness import Reference
from transformers import AutoModelForCausalLM

VOCAB = 512
POSITIONS = 1024
PLAIN = {
    "vocab_size": VOCAB,
    "hidden_size": 96,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
LEFT_OUT: Any = object()  # a key of PLAIN that a class does not know
UNGROUPED = {"num_key_value_heads": LEFT_OUT}
HEAD_16 = {"head_dim": 16}
WINDOW = {"sliding_window": 24}
OLD_NAMES = {
    **dict.fromkeys(PLAIN, LEFT_OUT),
    **{"n_embd": 96, "n_layer": 3, "n_head": 6, "n_positions": POSITIONS, "vocab_size": VOCAB},
    **{"bos_token_id": None, "eos_token_id": None},
}
MOE = {"num_experts": 6, "num_local_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
ROUTED = {
    **MOE,
    "n_routed_experts": 6,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
}
LATENT = {
    **{"kv_lora_rank": 32, "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 20},
    "num_key_value_heads": 6,
}
GEMMA = {**HEAD_16, **WINDOW, "query_pre_attn_scalar": 16}
NO_SPECIALS = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 0)


@dataclass(frozen=True)
class ForeignSpec:
    """`config` is the class in transformers, `changes` what differs from `PLAIN`."""

    name: str
    config: str
    changes: Mapping[str, Any] = field(default_factory=dict, hash=False)
    std: float = 0.15
    seed: int = 0
    vocab: int = VOCAB


NAMED = [
    ForeignSpec("gpt-neox", "GPTNeoXConfig", {**UNGROUPED, "rotary_pct": 0.25}, std=0.2),
    ForeignSpec("olmo2", "Olmo2Config"),
    ForeignSpec("phi3", "Phi3Config", WINDOW),
    ForeignSpec(
        "granite",
        "GraniteConfig",
        {"logits_scaling": 3.0, "attention_multiplier": 0.2, "residual_multiplier": 0.5, "embedding_multiplier": 4.0},
    ),
    ForeignSpec("starcoder2", "Starcoder2Config", {"sliding_window": 40, "use_bias": True}, std=0.2),
]
MORE = [
    ForeignSpec("gemma2", "Gemma2Config", GEMMA),
    ForeignSpec("deepseek-v3", "DeepseekV3Config", {**ROUTED, **LATENT}),
    ForeignSpec("gpt2", "GPT2Config", OLD_NAMES, std=0.2),
    ForeignSpec("opt", "OPTConfig", {**UNGROUPED, "ffn_dim": 128, "word_embed_proj_dim": 64, "pad_token_id": 1}),
    ForeignSpec("gpt-bigcode", "GPTBigCodeConfig", OLD_NAMES, std=0.2),
    ForeignSpec("biogpt", "BioGptConfig", UNGROUPED),
    ForeignSpec("cohere", "CohereConfig", {"logit_scale": 0.25, "use_qk_norm": True}),
    ForeignSpec("cohere2", "Cohere2Config", {**WINDOW, "logit_scale": 0.25}),
    ForeignSpec("stablelm", "StableLmConfig", {"partial_rotary_factor": 0.25, "use_qkv_bias": True}),
    ForeignSpec("phi", "PhiConfig", {"partial_rotary_factor": 0.5}),
    ForeignSpec("persimmon", "PersimmonConfig", UNGROUPED),
    ForeignSpec("olmo", "OlmoConfig", {"clip_qkv": 1.0}),
    ForeignSpec("olmo3", "Olmo3Config", WINDOW),
    ForeignSpec("nemotron", "NemotronConfig", HEAD_16),
    ForeignSpec("glm", "GlmConfig", HEAD_16),
    ForeignSpec("glm4", "Glm4Config", HEAD_16),
    ForeignSpec("smollm3", "SmolLM3Config"),
    ForeignSpec("ernie4.5", "Ernie4_5Config", HEAD_16),
    ForeignSpec("helium", "HeliumConfig", HEAD_16),
    ForeignSpec("exaone4", "Exaone4Config", WINDOW),
    ForeignSpec("seed-oss", "SeedOssConfig", HEAD_16),
    ForeignSpec("gemma", "GemmaConfig", HEAD_16),
    ForeignSpec("gemma3", "Gemma3TextConfig", GEMMA),
    ForeignSpec("vaultgemma", "VaultGemmaConfig", GEMMA),
    ForeignSpec("llama", "LlamaConfig"),
    ForeignSpec(
        "llama-yarn",
        "LlamaConfig",
        {
            "rope_parameters": {
                **{"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0},
                "original_max_position_embeddings": 256,
            }
        },
    ),
    ForeignSpec("mistral", "MistralConfig", WINDOW),
    ForeignSpec("ministral", "MinistralConfig", {**WINDOW, **HEAD_16}),
    ForeignSpec("qwen2", "Qwen2Config", {**WINDOW, "use_sliding_window": True, "max_window_layers": 1}),
    ForeignSpec("qwen3", "Qwen3Config", HEAD_16),
    ForeignSpec("arcee", "ArceeConfig"),
    ForeignSpec("hunyuan-dense", "HunYuanDenseV1Config", HEAD_16),
    ForeignSpec("nanochat", "NanoChatConfig"),
    ForeignSpec("jais2", "Jais2Config"),
    ForeignSpec("bitnet", "BitNetConfig"),
    ForeignSpec("cwm", "CwmConfig", {**WINDOW, **HEAD_16, "bos_token_id": 0, "eos_token_id": 0}),
    ForeignSpec("modernbert-decoder", "ModernBertDecoderConfig", {"local_attention": 24, **NO_SPECIALS}),
    ForeignSpec("minicpm3", "MiniCPM3Config", LATENT),
    ForeignSpec("deepseek-v2", "DeepseekV2Config", {**ROUTED, **LATENT}),
    ForeignSpec("mixtral", "MixtralConfig", MOE),
    ForeignSpec("olmoe", "OlmoeConfig", MOE),
    ForeignSpec("flex-olmo", "FlexOlmoConfig", MOE),
    ForeignSpec("qwen2-moe", "Qwen2MoeConfig", {**MOE, "shared_expert_intermediate_size": 64}),
    ForeignSpec("qwen3-moe", "Qwen3MoeConfig", {**MOE, **HEAD_16}),
    ForeignSpec("granite-moe", "GraniteMoeConfig", MOE),
    ForeignSpec("phimoe", "PhimoeConfig", MOE),
    ForeignSpec("ernie4.5-moe", "Ernie4_5_MoeConfig", {**MOE, "moe_num_experts": 6, "moe_k": 2}),
    ForeignSpec("dots1", "Dots1Config", ROUTED),
    ForeignSpec("glm4-moe", "Glm4MoeConfig", {**ROUTED, **HEAD_16}),
    ForeignSpec("minimax-m2", "MiniMaxM2Config", {**MOE, **HEAD_16}),
    ForeignSpec("jetmoe", "JetMoeConfig", {**MOE, "kv_channels": 16, "num_attention_heads": LEFT_OUT}),
    ForeignSpec("afmoe", "AfmoeConfig", {**MOE, **HEAD_16}),
    ForeignSpec("hy-v3", "HYV3Config", {**MOE, **HEAD_16}),
    ForeignSpec("solar-open", "SolarOpenConfig", {**MOE, **HEAD_16}),
    ForeignSpec("exaone-moe", "ExaoneMoeConfig", {**MOE, **HEAD_16}),
]
REFUSED = [
    (ForeignSpec("falcon", "FalconConfig", {"alibi": False}), "does not go through"),
    (ForeignSpec("gptj", "GPTJConfig", {**OLD_NAMES, "rotary_dim": 8}), "does not go through"),
    (ForeignSpec("gpt-oss", "GptOssConfig", {**MOE, **HEAD_16}), "takes 's_aux'"),
    (ForeignSpec("granite-swa", "GraniteSWAConfig", WINDOW), "takes 's_aux'"),
    (ForeignSpec("diffllama", "DiffLlamaConfig"), "more than once per token"),
    (ForeignSpec("doge", "DogeConfig"), "adds a bias"),
    (
        ForeignSpec("llama4", "Llama4TextConfig", {**MOE, **HEAD_16, "attention_chunk_size": 32}),
        "neither causal nor a sliding window",
    ),
    (ForeignSpec("bert", "BertConfig", UNGROUPED), "not causal"),
    (ForeignSpec("mamba", "MambaConfig"), "recurrent layers"),
    (
        ForeignSpec("lfm2", "Lfm2Config", {"layer_types": ["conv", "full_attention", "conv"]}),
        "1 of its 3 layers use transformers' attention interface",
    ),
    (ForeignSpec("bloom", "BloomConfig", {**OLD_NAMES, "hidden_size": 96, "seq_length": 64}), "position_ids"),
]


def make_foreign(directory: Path, spec: ForeignSpec, dtype: torch.dtype = torch.float32) -> Path:
    """Write the model directory (no tokenizer) and return it."""
    torch.manual_seed(spec.seed)
    values = {key: value for key, value in {**PLAIN, **spec.changes}.items() if value is not LEFT_OUT}
    model = AutoModelForCausalLM.from_config(getattr(transformers, spec.config)(**values)).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 or name.endswith("bias"):
                parameter.normal_(0.0, spec.std)
            else:  # norms: some are stored as 1, some as 0
                parameter.add_(torch.randn_like(parameter) * spec.std)
    model.save_pretrained(directory)
    return directory


class ForeignReference(Reference):
    """The judge; experts one by one, because torch's grouped product does not take float64."""

    def __init__(self, model_dir: Path, dtype: torch.dtype = torch.float64) -> None:
        super().__init__(model_dir, dtype)
        if hasattr(self.model, "set_experts_implementation"):
            self.model.set_experts_implementation("eager")
