"""The families that our own decoder runs: what an `architectures` entry fixes, and what its keys are when left out.

Read by `config.py`, `layer_windows.py` and `rope_fields.py`. Knows no files and no tensors. Defaults are those that
transformers gives a key which config.json leaves out, since checkpoints are published with only what differs.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Sliding(Enum):
    """Which layers attend to a window only."""

    NEVER = "never"
    ALWAYS = "always"  # all, where `sliding_window` is given (Mistral)
    UPPER = "upper"  # from layer `max_window_layers` on, where `use_sliding_window` (Qwen)
    PATTERN = "pattern"  # all but every n-th (Gemma)


@dataclass(frozen=True, slots=True)
class Family:
    """What distinguishes one `architectures` entry from the plain Llama decoder."""

    qk_norm: bool = False  # RMS norm over each query and key head before the rotation
    qkv_bias: bool | None = None  # None: `attention_bias` decides, for the output projection too
    mlp_bias: bool = False  # whether `mlp_bias` is heeded
    sliding: Sliding = Sliding.NEVER
    full_every: int = 0  # with PATTERN, every layer of this number is full
    full_every_key: str | None = None  # ... unless this key says another
    local_rope: bool = False  # sliding layers have a rotary embedding of their own
    # Gemma: norms after both blocks too, weights of norms stored less 1, embeddings times sqrt(hidden size), and
    # `query_pre_attn_scalar` in place of the head size.
    gemma: bool = False
    attention_cap: float | None = None  # default of `attn_logit_softcapping`
    attention_cap_heeded: bool = False
    logit_cap: float | None = None  # default of `final_logit_softcapping`
    head_dim: int | None = None  # None: hidden size / heads
    activation_key: str = "hidden_act"
    activation: str = "silu"
    tied_embeddings: bool = False


FAMILIES = {
    "LlamaForCausalLM": Family(mlp_bias=True),
    "MistralForCausalLM": Family(qkv_bias=False, sliding=Sliding.ALWAYS),
    "Qwen2ForCausalLM": Family(qkv_bias=True, sliding=Sliding.UPPER),
    "Qwen3ForCausalLM": Family(qk_norm=True, sliding=Sliding.UPPER, head_dim=128),
    "Gemma2ForCausalLM": Family(
        sliding=Sliding.PATTERN,
        full_every=2,
        gemma=True,
        attention_cap=50.0,
        attention_cap_heeded=True,
        logit_cap=30.0,
        head_dim=256,
        activation_key="hidden_activation",
        activation="gelu_pytorch_tanh",
        tied_embeddings=True,
    ),
    "Gemma3ForCausalLM": Family(
        qk_norm=True,
        sliding=Sliding.PATTERN,
        full_every=6,
        full_every_key="sliding_window_pattern",
        local_rope=True,
        gemma=True,
        head_dim=256,
        activation_key="hidden_activation",
        activation="gelu_pytorch_tanh",
        tied_embeddings=True,
    ),
}
