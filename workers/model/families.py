"""The families that our own decoder runs: what an `architectures` entry fixes, and what its keys are when left out.

Read by `config.py`, `layer_windows.py`, `rope_fields.py`, `expert_layers.py` and `loading.py`. Knows no files and no
tensors. Defaults are those that transformers gives a key which config.json leaves out, since checkpoints are published
with only what differs.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Sliding(Enum):
    """Which layers attend to a window only."""

    NEVER = "never"
    ALWAYS = "always"  # all, where `sliding_window` is given (Mistral)
    SWITCHED = "switched"  # all, where `use_sliding_window` (Qwen's mixtures of experts)
    UPPER = "upper"  # from layer `max_window_layers` on, where `use_sliding_window` (Qwen)
    PATTERN = "pattern"  # all but every n-th (Gemma)


@dataclass(frozen=True, slots=True)
class ExpertNames:
    """What published checkpoints call the tensors: `BLOCK gate.weight`, `BLOCK experts.N.PROJECTION.weight`."""

    block: str = "mlp."
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"


@dataclass(frozen=True, slots=True)
class GroupLimited:
    """DeepSeek's way with experts: `group_limited.py` reads it. What is a number is a default."""

    biased: bool  # sigmoid scores and a bias for the choice (V3), else softmax scores
    count: int
    width: int
    shared: int  # experts that serve every token, without a gate
    scaling: float
    first_dense: int
    top_k: int | None = None
    groups: int | None = None
    top_groups: int | None = None


@dataclass(frozen=True, slots=True)
class LatentFamily:
    """Attention over one latent row per token: `latent_fields.py` reads its sizes."""

    interleave_key: str | None = None  # says whether rotated pairs are neighbours; None: they are


@dataclass(frozen=True, slots=True)
class ExpertFamily:
    """How a family says which of its layers have which experts."""

    count_keys: tuple[str, ...] = ("num_experts", "num_local_experts")  # names of one number, the usual one first
    width_key: str = "moe_intermediate_size"
    renormalize: bool | None = None  # None: `norm_topk_prob` decides
    some_dense: bool = True  # `decoder_sparse_step` and `mlp_only_layers` leave layers without experts
    shared: bool = False  # one expert more that serves every token, behind a gate of its own
    names: ExpertNames = ExpertNames()
    group_limited: GroupLimited | None = None  # reads what the other fields leave out in its own way


@dataclass(frozen=True, slots=True)
class Family:
    """What distinguishes one `architectures` entry from the plain Llama decoder."""

    qk_norm: bool = False  # RMS norm over each query and key head before the rotation
    qkv_bias: bool | None = None  # None: `attention_bias` decides, for the output projection too
    qkv_bias_key: str | None = None  # ... unless this key says another
    mlp_bias: bool = False  # whether `mlp_bias` is heeded
    sliding: Sliding = Sliding.NEVER
    window: int | None = 4096  # default of `sliding_window`
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
    rms_eps: float = 1e-6
    rope_theta: float = 10000.0
    experts: ExpertFamily | None = None
    latent: LatentFamily | None = None  # None: keys and values are kept
    # Modules that published checkpoints name in `auto_map` though transformers has the same classes: never run.
    superseded_code: tuple[str, ...] = ()


_DEEPSEEK_CODE = ("configuration_deepseek", "modeling_deepseek")
FAMILIES = {
    "LlamaForCausalLM": Family(mlp_bias=True),
    "MistralForCausalLM": Family(qkv_bias=False, sliding=Sliding.ALWAYS),
    "Qwen2ForCausalLM": Family(qkv_bias=True, sliding=Sliding.UPPER),
    "Qwen3ForCausalLM": Family(qk_norm=True, sliding=Sliding.UPPER, head_dim=128),
    "MixtralForCausalLM": Family(
        qkv_bias=False,
        sliding=Sliding.ALWAYS,
        window=None,
        rms_eps=1e-5,
        rope_theta=1000000.0,
        experts=ExpertFamily(
            count_keys=("num_local_experts", "num_experts"),
            width_key="intermediate_size",
            renormalize=True,
            some_dense=False,
            names=ExpertNames("block_sparse_moe.", "w1", "w3", "w2"),
        ),
    ),
    "Qwen2MoeForCausalLM": Family(
        qkv_bias=True, qkv_bias_key="qkv_bias", experts=ExpertFamily(count_keys=("num_experts",), shared=True)
    ),
    "Qwen3MoeForCausalLM": Family(qk_norm=True, sliding=Sliding.SWITCHED, experts=ExpertFamily()),
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
    "DeepseekV2ForCausalLM": Family(
        mlp_bias=True,
        experts=ExpertFamily(
            count_keys=("n_routed_experts", "num_experts"),
            group_limited=GroupLimited(biased=False, count=64, width=1407, shared=2, scaling=1.0, first_dense=0),
        ),
        latent=LatentFamily(),
        superseded_code=_DEEPSEEK_CODE,
    ),
    "DeepseekV3ForCausalLM": Family(
        experts=ExpertFamily(
            count_keys=("n_routed_experts", "num_local_experts"),
            group_limited=GroupLimited(
                biased=True,
                count=256,
                width=2048,
                shared=1,
                scaling=2.5,
                first_dense=3,
                top_k=8,
                groups=8,
                top_groups=4,
            ),
        ),
        latent=LatentFamily("rope_interleave"),
        superseded_code=_DEEPSEEK_CODE,
    ),
}
