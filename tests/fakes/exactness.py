"""Random checkpoints, and transformers as the judge of greedy output and logprobs.

The judge runs in float64 over (prompt + our output), teacher-forced: every one of our tokens must be its first choice,
or one of its first two where these are closer than `TIE_GAP`; comparison then goes on from our token. If all are first
choices, ours is what `generate` gives; `Reference.generate` also asks for that directly, in float32.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

TIE_GAP = 1e-4
CONFIGS: dict[str, type[PreTrainedConfig]] = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "gemma2": Gemma2Config,
    "gemma3": Gemma3TextConfig,
    "qwen3-moe": Qwen3MoeConfig,
    "mixtral": MixtralConfig,
    "qwen2-moe": Qwen2MoeConfig,
    "deepseek-v2": DeepseekV2Config,
    "deepseek-v3": DeepseekV3Config,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@dataclass(frozen=True)
class CheckpointSpec:
    """A small random model; weights are normal with standard deviation `std`, so that outputs are diverse."""

    family: str = "llama"  # one of CONFIGS
    heads: int = 6
    kv_heads: int = 2
    head_dim: int = 48
    layers: int = 2
    hidden: int = 240
    intermediate: int = 256
    vocab: int = 1024
    tied: bool = False
    llama3_rope: bool = False
    attention_bias: bool = False
    max_positions: int = 1024
    std: float = 0.1
    seed: int = 0
    changes: str = "{}"  # JSON object of further keys of the transformers configuration

    @property
    def name(self) -> str:
        parts = [self.family, f"{self.heads}x{self.kv_heads}", f"d{self.head_dim}", "tied" if self.tied else "untied"]
        return "-".join(parts + ["rope3"] * self.llama3_rope + ["bias"] * self.attention_bias)


def covering_specs() -> list[CheckpointSpec]:
    """Head counts 6/2, 5/5, 4/1 and head sizes 48, 64, 80, 128, both families, tied and untied, all pairs covered."""
    rows = [
        ("llama", (6, 2), 48, False, False),
        ("llama", (5, 5), 64, True, False),
        ("llama", (4, 1), 80, False, True),
        ("llama", (6, 2), 128, True, True),
        ("llama", (5, 5), 80, False, False),
        ("llama", (4, 1), 48, True, False),
        ("qwen3", (6, 2), 64, False, False),
        ("qwen3", (5, 5), 48, True, False),
        ("qwen3", (4, 1), 128, False, False),
        ("qwen3", (6, 2), 80, True, False),
        ("qwen3", (5, 5), 128, False, False),
        ("qwen3", (4, 1), 64, True, False),
    ]
    seeds = {7: 24}  # the one of seed 7 soon repeats itself
    return [
        CheckpointSpec(
            family,
            *heads,
            head_dim,
            tied=tied,
            llama3_rope=rope,
            attention_bias=number % 5 == 2,
            seed=seeds.get(number, number),
        )
        for number, (family, heads, head_dim, tied, rope) in enumerate(rows)
    ]


def family_specs() -> list[CheckpointSpec]:
    """Three of each newer family: windows that no block size divides, caps that bite, every kind of rotary scaling."""
    full, slides = "full_attention", "sliding_attention"
    plain = {"rope_type": "default", "rope_theta": 1e4}
    linear = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 16.0, "original_max_position_embeddings": 64}
    by_switch = {"use_sliding_window": True, "max_window_layers": 1}
    gemma2 = {"attn_logit_softcapping": 6.0, "final_logit_softcapping": 6.0, "query_pre_attn_scalar": 24}
    gemma3 = {"query_pre_attn_scalar": 4, "rope_parameters": {full: {**linear, "rope_theta": 5e4}, slides: plain}}
    mixed = {"layer_types": [slides, full, slides], "rope_parameters": {full: yarn, slides: plain}}
    rows: list[tuple[str, tuple[int, int], int, bool, int, dict[str, Any]]] = [
        ("mistral", (6, 2), 48, False, 2, {"sliding_window": 24}),
        ("mistral", (5, 5), 64, True, 2, {"sliding_window": 40, "rope_parameters": linear}),
        ("mistral", (4, 1), 128, False, 2, {"sliding_window": None, "rope_parameters": yarn}),
        ("qwen2", (4, 1), 48, False, 2, {**by_switch, "sliding_window": 24}),
        ("qwen2", (6, 2), 64, True, 2, {"rope_parameters": {**yarn, "attention_factor": 1.3, "truncate": False}}),
        ("qwen2", (5, 5), 80, False, 3, {**by_switch, "sliding_window": 40}),
        ("gemma2", (6, 2), 64, True, 2, {**gemma2, "sliding_window": 24}),
        ("gemma2", (4, 1), 256, True, 3, {**gemma2, "sliding_window": 40}),
        ("gemma2", (5, 5), 48, False, 2, {**gemma2, "sliding_window": 40, "attention_bias": True}),
        ("gemma3", (4, 1), 80, True, 6, {**gemma3, "sliding_window": 24}),
        ("gemma3", (6, 2), 256, True, 2, {**gemma3, "sliding_window": 40, "layer_types": [full, slides]}),
        ("gemma3", (5, 5), 128, False, 3, {**gemma3, **mixed, "sliding_window": 40, "final_logit_softcapping": 8.0}),
    ]
    return [
        CheckpointSpec(family, *heads, dim, layers, tied=tied, seed=50 + n, changes=json.dumps(changes))
        for n, (family, heads, dim, tied, layers, changes) in enumerate(rows)
    ]


def expert_specs() -> list[CheckpointSpec]:
    """Two of each family with experts: few and many of them, one or all chosen, dense layers between, with windows."""
    some = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 96, "norm_topk_prob": True}
    many = {"num_experts": 33, "num_experts_per_tok": 5, "moe_intermediate_size": 40}
    windows = {"use_sliding_window": True, "sliding_window": 24}
    sparse = {"decoder_sparse_step": 2, "mlp_only_layers": [3]}
    rows: list[tuple[str, tuple[int, int], int, bool, int, dict[str, Any]]] = [
        ("qwen3-moe", (6, 2), 64, False, 2, {**some, "mlp_only_layers": [0]}),
        ("qwen3-moe", (4, 1), 48, True, 4, {**many, **windows, **sparse}),
        ("mixtral", (5, 5), 48, False, 2, {"num_local_experts": 6, "num_experts_per_tok": 2}),
        ("mixtral", (6, 2), 80, True, 2, {"num_local_experts": 3, "num_experts_per_tok": 3, "sliding_window": 24}),
        ("qwen2-moe", (4, 1), 64, False, 2, {**many, "shared_expert_intermediate_size": 72}),
        ("qwen2-moe", (6, 2), 48, False, 2, {**some, "shared_expert_intermediate_size": 72, "qkv_bias": False}),
    ]
    return [
        CheckpointSpec(family, *heads, dim, layers, tied=tied, seed=70 + n, changes=json.dumps(changes))
        for n, (family, heads, dim, tied, layers, changes) in enumerate(rows)
    ]


def make_checkpoint(
    directory: Path,
    spec: CheckpointSpec,
    *,
    dtype: torch.dtype = torch.float32,
    shards: int = 1,
    stacked_experts: bool = False,
) -> Path:
    """Write the model directory (no tokenizer) and return it; `stacked_experts`: a layer's are one tensor."""
    torch.manual_seed(spec.seed)
    model = AutoModelForCausalLM.from_config(_config(spec)).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # transformers starts biases at zero and norms at one, Gemma's less 1
                parameter.normal_(0.0, spec.std)
            elif "norm" in name:
                parameter.normal_(_norm_mean(spec, name), spec.std)
        for name, buffer in model.named_buffers():
            if name.endswith("correction_bias"):  # of the choice of experts, zero at first
                buffer.normal_(0.0, spec.std)
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    largest = 2 * size if shards == 1 else size // shards
    model.save_pretrained(directory, max_shard_size=largest, save_original_format=not stacked_experts)
    return directory


def _norm_mean(spec: CheckpointSpec, name: str) -> float:
    """Gemma's scaled embedding, where it is the head too, would have every token repeated but for strong blocks."""
    if not spec.family.startswith("gemma"):
        return 1.0
    return 16.0 if ".post_" in name else 0.0


def _config(spec: CheckpointSpec) -> PreTrainedConfig:
    keys: dict[str, Any] = {
        "vocab_size": spec.vocab,
        "hidden_size": spec.hidden,
        "intermediate_size": spec.intermediate,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "head_dim": spec.head_dim,
        "max_position_embeddings": spec.max_positions,
        "tie_word_embeddings": spec.tied,
        "initializer_range": spec.std,
        "rms_norm_eps": 1e-6,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if spec.family in ("llama", "qwen3"):
        keys["attention_bias"] = spec.attention_bias
    if spec.family != "gemma3":
        rope = LLAMA3_ROPE if spec.llama3_rope else {"rope_type": "default", "rope_theta": 10000.0}
        keys["rope_parameters"] = dict(rope)
    return CONFIGS[spec.family](**{**keys, **json.loads(spec.changes)})


def mixed_prompts(vocab: int, count: int = 64, longest: int = 150, seed: int = 0) -> list[tuple[int, ...]]:
    """Prompts of lengths 1 .. longest, block borders included; every fourth shares its beginning with another."""
    rng = np.random.default_rng(seed)
    lengths = [1, 2, 15, 16, 17, 31, 32, 33, 48, 64, 65, *rng.integers(1, longest + 1, count).tolist()][:count]
    prompts = [tuple(rng.integers(0, vocab, length).tolist()) for length in lengths]
    shared = tuple(rng.integers(0, vocab, min(80, longest)).tolist())
    return [shared[: len(p) * 3 // 4] + p[len(p) * 3 // 4 :] if i % 4 == 3 else p for i, p in enumerate(prompts)]


@dataclass
class Verdict:
    """What a comparison found. `wrong` holds (prompt, step, ours, expected)."""

    steps: int = 0
    ties: int = 0
    wrong: list[tuple[int, int, int, int]] = field(default_factory=list)

    def require_exact(self, tie_share: float = 1e-3) -> None:
        """Raise AssertionError with the findings unless every step is right and ties are as rare as allowed."""
        assert not self.wrong, (
            f"{len(self.wrong)} of {self.steps} steps differ; first (prompt, step, ours, theirs): {self.wrong[:5]}"
        )
        assert self.ties <= max(1, tie_share * self.steps), f"{self.ties} of {self.steps} steps are near-ties"


class Reference:
    """transformers on the same checkpoint; experts one by one, because torch's grouped product takes no float64."""

    def __init__(self, model_dir: Path, dtype: torch.dtype = torch.float64) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype, attn_implementation="eager").eval()
        self.vocab = int(json.loads((model_dir / "config.json").read_text())["vocab_size"])
        if hasattr(self.model, "set_experts_implementation"):
            self.model.set_experts_implementation("eager")

    def logits(self, prompts: Sequence[Sequence[int]], outputs: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """For each prompt, the logits [len(output), vocab] from which its output tokens were to be chosen."""
        results: list[torch.Tensor] = []
        for begin in range(0, len(prompts), 16):
            part = [[*p, *o] for p, o in zip(prompts[begin : begin + 16], outputs[begin : begin + 16], strict=True)]
            ids = torch.zeros(len(part), max(len(row) for row in part), dtype=torch.int64)
            for row, tokens in enumerate(part):
                ids[row, : len(tokens)] = torch.tensor(tokens)
            with torch.inference_mode():  # causal: what stands right of a row cannot matter
                logits = self.model(input_ids=ids, use_cache=False).logits
            for row, prompt in enumerate(prompts[begin : begin + 16]):
                results.append(logits[row, len(prompt) - 1 : len(part[row]) - 1])
        return results

    def judge(self, prompts: Sequence[Sequence[int]], outputs: Sequence[Sequence[int]]) -> Verdict:
        """Greedy output of ours against this model, step by step."""
        verdict = Verdict()
        for number, (logits, output) in enumerate(zip(self.logits(prompts, outputs), outputs, strict=True)):
            values, ids = torch.topk(logits, 2, dim=-1)
            close = (values[:, 0] - values[:, 1] < TIE_GAP).tolist()
            for step, (ours, (first, second), tie) in enumerate(zip(output, ids.tolist(), close, strict=True)):
                verdict.steps += 1
                verdict.ties += tie
                if ours != first and not (tie and ours == second):
                    verdict.wrong.append((number, step, ours, first))
        return verdict

    def logprobs(self, prompts: Sequence[Sequence[int]], outputs: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """For each prompt, natural log probabilities [len(output), vocab]."""
        return [torch.log_softmax(logits, dim=-1) for logits in self.logits(prompts, outputs)]

    def generate(self, prompt: Sequence[int], count: int) -> list[int]:
        """`transformers.generate`, greedy, exactly `count` tokens."""
        ids = torch.tensor([list(prompt)])
        with torch.inference_mode():
            out = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=count,
                min_new_tokens=count,
            )
        return [int(token) for token in out[0, len(prompt) :]]
