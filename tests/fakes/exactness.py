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

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen3Config

TIE_GAP = 1e-4
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

    family: str = "llama"  # llama | qwen3
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


def make_checkpoint(
    directory: Path, spec: CheckpointSpec, *, dtype: torch.dtype = torch.float32, shards: int = 1
) -> Path:
    """Write the model directory (no tokenizer) and return it."""
    torch.manual_seed(spec.seed)
    model = AutoModelForCausalLM.from_config(_config(spec)).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # transformers starts biases at zero and norms at one
                parameter.normal_(0.0, spec.std)
            elif "norm" in name:
                parameter.normal_(1.0, spec.std)
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    model.save_pretrained(directory, max_shard_size=size + 1 if shards == 1 else size // shards)
    return directory


def _config(spec: CheckpointSpec) -> PreTrainedConfig:
    kind = {"llama": LlamaConfig, "qwen3": Qwen3Config}[spec.family]
    rope = LLAMA3_ROPE if spec.llama3_rope else {"rope_type": "default", "rope_theta": 10000.0}
    return kind(
        vocab_size=spec.vocab,
        hidden_size=spec.hidden,
        intermediate_size=spec.intermediate,
        num_hidden_layers=spec.layers,
        num_attention_heads=spec.heads,
        num_key_value_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        max_position_embeddings=spec.max_positions,
        tie_word_embeddings=spec.tied,
        attention_bias=spec.attention_bias,
        rope_parameters=dict(rope),
        initializer_range=spec.std,
        rms_norm_eps=1e-6,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )


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
    """transformers on the same checkpoint."""

    def __init__(self, model_dir: Path, dtype: torch.dtype = torch.float64) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype, attn_implementation="eager").eval()
        self.vocab = int(json.loads((model_dir / "config.json").read_text())["vocab_size"])

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
