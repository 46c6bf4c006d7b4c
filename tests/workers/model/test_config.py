"""config.json: both transformers generations are read, and what cannot be served is refused by name."""

import json

import pytest
from fakes.exactness import CheckpointSpec, expert_specs, family_specs, make_checkpoint

from penstock.workers.errors import ModelError
from penstock.workers.model.config import is_native, parse_config, read_config
from penstock.workers.model.rope_fields import Rope, RopeScaling

LLAMA31 = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
    "hidden_act": "silu",
}


def test_llama31_as_published():
    config = parse_config(LLAMA31, "config.json")
    assert config.head_dim == 128
    assert config.rope == Rope(500000.0, RopeScaling("llama3", 8.0, 1.0, 4.0, 8192))
    assert config.windows == (0,) * 32
    assert config.attention_scale == 128**-0.5
    assert (config.activation, config.embedding_scale, config.norm_offset) == ("silu", 1.0, 0.0)
    assert config.dtype == "bfloat16"
    assert not config.qk_norm


def test_transformers_5_writes_rope_parameters_and_dtype():
    raw = {key: value for key, value in LLAMA31.items() if not key.startswith("rope") and key != "torch_dtype"}
    raw["rope_parameters"] = {**LLAMA31["rope_scaling"], "rope_theta": 500000.0}
    raw["dtype"] = "bfloat16"
    assert parse_config(raw, "config.json") == parse_config(LLAMA31, "config.json")


def test_what_transformers_saves_is_read(tmp_path):
    spec = CheckpointSpec("qwen3", 4, 1, 64, tied=True, attention_bias=True)
    config = read_config(make_checkpoint(tmp_path, spec))
    assert (config.num_heads, config.num_kv_heads, config.head_dim, config.qk_norm) == (4, 1, 64, True)
    assert (config.tied_embeddings, config.qkv_bias, config.output_bias, config.dtype) == (True, True, True, "float32")


def test_old_names_and_defaults():
    raw = {
        k: v
        for k, v in LLAMA31.items()
        if k not in ("rope_scaling", "rope_theta", "num_key_value_heads", "torch_dtype")
    }
    config = parse_config(raw, "config.json")
    assert (config.rope, config.num_kv_heads, config.dtype) == (Rope(10000.0), 32, "float32")
    raw["rope_scaling"] = {"type": "linear", "factor": 2.0}
    assert parse_config(raw, "config.json").rope == Rope(10000.0, RopeScaling("linear", 2.0))


MISTRAL = {
    **{key: value for key, value in LLAMA31.items() if key != "rope_scaling"},
    "architectures": ["MistralForCausalLM"],
    "sliding_window": 4096,
}
QWEN25 = {
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 21,
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151936,
}
GEMMA2 = {
    "architectures": ["Gemma2ForCausalLM"],
    "attention_bias": False,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "max_position_embeddings": 8192,
    "num_attention_heads": 8,
    "num_hidden_layers": 26,
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 224,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "torch_dtype": "float32",
    "vocab_size": 256000,
}
GEMMA3 = {
    "architectures": ["Gemma3ForCausalLM"],
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "max_position_embeddings": 32768,
    "num_attention_heads": 4,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "torch_dtype": "bfloat16",
    "vocab_size": 262144,
}
QWEN3_30B = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151936,
}
MIXTRAL = {
    "architectures": ["MixtralForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 32000,
}
QWEN15_MOE = {
    **QWEN25,
    "architectures": ["Qwen2MoeForCausalLM"],
    "decoder_sparse_step": 1,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "moe_intermediate_size": 1408,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "num_key_value_heads": 16,
    "shared_expert_intermediate_size": 5632,
}


def test_mistral_as_published():
    config = parse_config(MISTRAL, "config.json")
    assert config.windows == (4096,) * 32
    assert (config.qkv_bias, config.output_bias, config.mlp_bias, config.head_dim) == (False, False, False, 128)
    assert parse_config({**MISTRAL, "sliding_window": None}, "config.json").windows == (0,) * 32


def test_qwen2_as_published():
    config = parse_config(QWEN25, "config.json")
    assert config.windows == (0,) * 24
    assert (config.qkv_bias, config.output_bias, config.qk_norm, config.head_dim) == (True, False, False, 64)
    sliding = parse_config({**QWEN25, "use_sliding_window": True}, "config.json")
    assert sliding.windows == (0,) * 21 + (32768,) * 3


def test_gemma2_as_published():
    config = parse_config(GEMMA2, "config.json")
    assert config.windows == (4096, 0) * 13
    assert (config.attention_cap, config.logit_cap, config.attention_scale) == (50.0, 30.0, 224**-0.5)
    assert (config.activation, config.embedding_scale, config.norm_offset) == ("gelu_tanh", 48.0, 1.0)
    assert (config.post_norms, config.qk_norm, config.tied_embeddings) == (True, False, True)
    assert config.local_rope is None
    defaults = {k: v for k, v in GEMMA2.items() if not k.endswith("capping") and k != "head_dim"}
    assert parse_config({**defaults, "query_pre_attn_scalar": 224}, "config.json") == config
    uncapped = parse_config({**GEMMA2, "attn_logit_softcapping": None, "final_logit_softcapping": None}, "config.json")
    assert (uncapped.attention_cap, uncapped.logit_cap) == (0.0, 0.0)


def test_gemma3_as_published():
    config = parse_config(GEMMA3, "config.json")
    assert config.windows == (512, 512, 512, 512, 512, 0) * 4 + (512, 512)
    assert (config.rope, config.local_rope) == (Rope(1000000.0), Rope(10000.0))
    assert (config.attention_cap, config.logit_cap, config.qk_norm) == (0.0, 0.0, True)
    assert (config.tied_embeddings, config.post_norms, config.norm_offset) == (True, True, 1.0)
    scaled = parse_config({**GEMMA3, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}, "config.json")
    assert (scaled.rope, scaled.local_rope) == (Rope(1000000.0, RopeScaling("linear", 8.0)), Rope(10000.0))


def test_qwen3_moe_as_published():
    config = parse_config(QWEN3_30B, "config.json")
    experts = config.experts
    assert (experts.count, experts.top_k, experts.width, experts.renormalize) == (128, 8, 768, True)
    assert (experts.layers, config.windows) == ((True,) * 48, (0,) * 48)
    assert (config.qk_norm, config.qkv_bias, config.output_bias, config.head_dim) == (True, False, False, 128)
    # transformers, unlike for Qwen3, has no head size of its own for this family
    assert parse_config({**QWEN3_30B, "head_dim": None}, "config.json").head_dim == 64
    windowed = parse_config({**QWEN3_30B, "use_sliding_window": True, "sliding_window": 512}, "config.json")
    assert windowed.windows == (512,) * 48


def test_mixtral_as_published():
    config = parse_config(MIXTRAL, "config.json")
    assert (config.experts.count, config.experts.top_k, config.experts.width) == (8, 2, 14336)
    assert (config.rms_eps, config.rope, config.windows) == (1e-5, Rope(1e6), (0,) * 32)
    assert (config.qk_norm, config.qkv_bias, config.head_dim) == (False, False, 128)
    left_out = ("rms_norm_eps", "rope_theta", "sliding_window", "tie_word_embeddings", "hidden_act")
    assert parse_config({k: v for k, v in MIXTRAL.items() if k not in left_out}, "config.json") == config


def test_qwen2_moe_as_published():
    config = parse_config(QWEN15_MOE, "config.json")
    assert (config.experts.count, config.experts.top_k, config.experts.shared_width) == (60, 4, 5632)
    assert (config.qkv_bias, config.output_bias, config.qk_norm, config.windows) == (True, False, False, (0,) * 24)
    assert not parse_config({**QWEN15_MOE, "qkv_bias": False}, "config.json").qkv_bias


@pytest.mark.parametrize("spec", family_specs() + expert_specs(), ids=lambda spec: spec.name)
def test_every_family_as_transformers_saves_it(tmp_path, spec):
    raw = json.loads((make_checkpoint(tmp_path, spec) / "config.json").read_text())
    config = parse_config(raw, "config.json")
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (spec.heads, spec.kv_heads, spec.head_dim)
    changes = json.loads(spec.changes)
    for kind, window in zip(raw.get("layer_types") or [], config.windows, strict=False):
        assert window == (changes["sliding_window"] if kind == "sliding_attention" else 0)


def test_native_is_what_can_be_parsed():
    assert is_native(LLAMA31)
    assert is_native(GEMMA3)
    assert not is_native({**GEMMA3, "architectures": ["Gemma3ForConditionalGeneration"]})
    assert not is_native({**GEMMA3, "use_bidirectional_attention": True})
    assert not is_native({"architectures": ["MambaForCausalLM"]})
    assert not is_native({})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"architectures": ["MambaForCausalLM"]},
            "architectures: 'MambaForCausalLM' is not supported; supported are Llama",
        ),
        ({"architectures": []}, "architectures: missing"),
        ({"architectures": "LlamaForCausalLM"}, "architectures: missing"),
        ({"hidden_size": None}, "hidden_size: missing"),
        ({"hidden_size": "4096"}, "hidden_size: '4096' is not an integer"),
        ({"hidden_size": True}, "hidden_size: True is not an integer"),
        ({"hidden_size": 4097}, "hidden_size: 4097 is not a multiple of num_attention_heads"),
        ({"num_hidden_layers": 0}, "num_hidden_layers: 0 is not in 1"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers: 1000000000 is not in"),
        ({"num_key_value_heads": 7}, "num_key_value_heads: 7 does not divide"),
        ({"head_dim": 65}, "head_dim: 65 is odd"),
        ({"vocab_size": -1}, "vocab_size: -1 is not in"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps: nan is not a number"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps: 1000"),
        ({"rope_theta": "big"}, "rope_theta: 'big' is not a number"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "rope_scaling.rope_type: 'longrope' is not supported"),
        ({"rope_scaling": {"rope_type": ["linear"]}}, "rope_scaling.rope_type: \\['linear'\\] is not supported"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2}}, "rope_scaling.low_freq_factor: missing"),
        (
            {"rope_scaling": {**LLAMA31["rope_scaling"], "high_freq_factor": 1.0}},
            "rope_scaling.high_freq_factor: 1.0 must",
        ),
        ({"rope_scaling": [1]}, "rope_scaling: must be an object"),
        (
            {"rope_scaling": None, "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "rope_parameters.partial_rotary_factor: only 1.0",
        ),
        ({"hidden_act": "gelu"}, "hidden_act: 'gelu' is not supported"),
        ({"use_sliding_window": True}, "use_sliding_window: "),
        ({"layer_types": ["sliding_attention"] * 32}, "layer_types: only full_attention"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config: quantised"),
        ({"auto_map": {"AutoModel": "x.Y"}}, "auto_map: model directories with their own code"),
        ({"torch_dtype": "float8_e4m3fn"}, "torch_dtype: 'float8_e4m3fn' is not supported"),
        ({"torch_dtype": ["bfloat16"]}, "torch_dtype: "),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings: 'no' is not true or false"),
    ],
)
def test_refusals_name_file_and_key(change, message):
    with pytest.raises(ModelError, match=r"^some/config.json: " + message) as caught:
        parse_config({**LLAMA31, **change}, "some/config.json")
    assert caught.value.path == "some/config.json"


@pytest.mark.parametrize(
    ("published", "change", "message"),
    [
        (MISTRAL, {"sliding_window": 0}, "sliding_window: 0 is not in 1"),
        (MISTRAL, {"sliding_window": "4096"}, "sliding_window: '4096' is not an integer"),
        (MISTRAL, {"layer_types": ["full_attention"] * 32}, "layer_types: only sliding_attention"),
        (MISTRAL, {"attention_bias": True}, "attention_bias: this architecture has none"),
        (MISTRAL, {"mlp_bias": True}, "mlp_bias: this architecture has none"),
        (MISTRAL, {"use_sliding_window": True}, "use_sliding_window: not supported"),
        (QWEN25, {"use_sliding_window": 1}, "use_sliding_window: 1 is not true or false"),
        (QWEN25, {"use_sliding_window": True, "max_window_layers": -1}, "max_window_layers: -1 is not in"),
        (QWEN25, {"layer_types": ["sliding_attention"] * 24}, "layer_types: has sliding_attention layers, but no"),
        (QWEN25, {"layer_types": ["full_attention"] * 23}, "layer_types: must be a list of 24"),
        (QWEN25, {"layer_types": ["chunked_attention"] * 24}, "layer_types: 'chunked_attention' is not supported"),
        (QWEN25, {"layer_types": [[]] * 24}, "layer_types: \\[\\] is not supported"),
        (GEMMA2, {"hidden_activation": "gelu"}, "hidden_activation: 'gelu' is not supported"),
        (GEMMA2, {"attn_logit_softcapping": 0}, "attn_logit_softcapping: 0 is not in"),
        (GEMMA2, {"final_logit_softcapping": "30"}, "final_logit_softcapping: '30' is not a number"),
        (GEMMA2, {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar: 0 is not in"),
        (GEMMA2, {"sliding_window": None}, "layer_types: has sliding_attention layers, but no window"),
        (GEMMA2, {"use_bidirectional_attention": True}, "use_bidirectional_attention: only causal"),
        (GEMMA2, {"quantization_config": {"bits": 4}}, "quantization_config: quantised"),
        (GEMMA3, {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping: not supported"),
        (GEMMA3, {"sliding_window_pattern": 0}, "sliding_window_pattern: 0 is not in 1"),
        (QWEN3_30B, {"num_experts_per_tok": 129}, "num_experts_per_tok: 129 is not in 1 .. 128"),
        (QWEN3_30B, {"mlp_bias": True}, "mlp_bias: this architecture has none"),
        (QWEN15_MOE, {"use_sliding_window": True}, "use_sliding_window: not supported"),
        (QWEN15_MOE, {"qkv_bias": 1}, "qkv_bias: 1 is not true or false"),
        (MIXTRAL, {"attention_bias": True}, "attention_bias: this architecture has none"),
    ],
)
def test_refusals_of_the_newer_families(published, change, message):
    with pytest.raises(ModelError, match=r"^some/config.json: " + message):
        parse_config({**published, **change}, "some/config.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        (b"{", "not JSON"),
        (b"\xff\xfe{}", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", "must be an object"),
        (b" " * (5 << 20), "larger than"),
    ],
)
def test_unreadable_files(tmp_path, content, message):
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ModelError, match=message):
        read_config(tmp_path)


def test_no_directory(tmp_path):
    with pytest.raises(ModelError, match="no such model directory"):
        read_config(tmp_path / "absent")
    (tmp_path / "config.json").write_text(json.dumps(LLAMA31))
    assert read_config(tmp_path).num_layers == 32
