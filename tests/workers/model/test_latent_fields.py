"""config.json of the families with latent rows: as published, as transformers saves it, defaults, refusals by key."""

import json

import pytest
from fakes.exactness import make_checkpoint
from fakes.latent_specs import latent_specs
from transformers import DeepseekV2Config, DeepseekV3Config

from penstock.workers.errors import ModelError
from penstock.workers.model.config import is_native, parse_config
from penstock.workers.model.latent_fields import LatentShape
from penstock.workers.model.rope_fields import Rope, RopeScaling

YARN = {
    "beta_fast": 32,
    "beta_slow": 1,
    "factor": 40,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
    "original_max_position_embeddings": 4096,
    "type": "yarn",
}
V2_LITE = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "attention_bias": False,
    "auto_map": {
        "AutoConfig": "configuration_deepseek.DeepseekV2Config",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekV2ForCausalLM",
    },
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v2",
    "moe_intermediate_size": 1408,
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": YARN,
    "rope_theta": 10000,
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "greedy",
    "torch_dtype": "bfloat16",
    "v_head_dim": 128,
    "vocab_size": 102400,
}
V3 = {
    **V2_LITE,
    "architectures": ["DeepseekV3ForCausalLM"],
    "first_k_dense_replace": 3,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "vocab_size": 129280,
}


def test_v2_lite_as_published():
    config = parse_config(V2_LITE, "config.json")
    assert config.latent == LatentShape(None, 512, 128, 64, 128, interleaved=True)
    assert (config.latent.stored_dim, config.latent.query_dim) == (576, 192)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (16, 1, 64)
    scaling = RopeScaling("yarn", 40.0, original_positions=4096, mscale=0.707, mscale_all_dim=0.707)
    assert config.rope == Rope(10000.0, scaling)
    # The figure of the published code: 192^-0.5 (0.1 * 0.707 ln 40 + 1)^2.
    assert config.attention_scale == pytest.approx(0.1147213867929261, rel=1e-12)


def test_v3_as_published():
    config = parse_config(V3, "config.json")
    assert config.latent == LatentShape(1536, 512, 128, 64, 128, interleaved=True)
    assert config.attention_scale == pytest.approx(192**-0.5 * 1.3688879454113936**2, rel=1e-12)
    assert (config.qkv_bias, config.output_bias, config.mlp_bias) == (False, False, False)


def test_no_yarn_no_temperature():
    plain = {**V3, "rope_scaling": None}
    assert parse_config(plain, "config.json").attention_scale == 192**-0.5
    for scaling in ({**YARN, "mscale_all_dim": 0}, {k: v for k, v in YARN.items() if k != "mscale_all_dim"}):
        assert parse_config({**V3, "rope_scaling": scaling}, "config.json").attention_scale == 192**-0.5
    default = {"rope_type": "default", "rope_theta": 1e4, "mscale_all_dim": 1.0}
    assert parse_config({**plain, "rope_parameters": default}, "config.json").attention_scale == 192**-0.5
    unscaled = {**V3, "rope_scaling": {**YARN, "factor": 1.0}}
    assert parse_config(unscaled, "config.json").attention_scale == 192**-0.5


@pytest.mark.parametrize("spec", latent_specs(), ids=lambda spec: spec.name)
def test_every_family_as_transformers_saves_it(tmp_path, spec):
    raw = json.loads((make_checkpoint(tmp_path, spec) / "config.json").read_text())
    changes, latent = json.loads(spec.changes), parse_config(raw, "config.json").latent
    assert (latent.query_rank, latent.kv_rank) == (changes["q_lora_rank"], changes["kv_lora_rank"])
    assert (latent.plain_dim, latent.rope_dim) == (changes["qk_nope_head_dim"], spec.head_dim)
    assert latent.value_dim == changes["v_head_dim"]
    assert latent.interleaved == changes.get("rope_interleave", True)


@pytest.mark.parametrize(
    ("architecture", "theirs"),
    [("DeepseekV2ForCausalLM", DeepseekV2Config()), ("DeepseekV3ForCausalLM", DeepseekV3Config())],
)
def test_defaults_are_those_of_transformers(architecture, theirs):
    stated = {key: V3[key] for key in ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")}
    rest = {"num_hidden_layers": 4, "max_position_embeddings": 64}
    if architecture == "DeepseekV2ForCausalLM":
        rest["num_experts_per_tok"] = 6  # transformers has no default that runs
    ours = parse_config({"architectures": [architecture], **stated, **rest}, "config.json")
    latent, experts = ours.latent, ours.experts
    assert (latent.query_rank, latent.kv_rank) == (theirs.q_lora_rank, theirs.kv_lora_rank)
    assert (latent.plain_dim, latent.rope_dim) == (theirs.qk_nope_head_dim, theirs.qk_rope_head_dim)
    assert latent.value_dim == theirs.v_head_dim
    assert (experts.count, experts.width) == (theirs.n_routed_experts, theirs.moe_intermediate_size)
    assert experts.shared_width == theirs.moe_intermediate_size * theirs.n_shared_experts
    assert (experts.scaling, experts.renormalize) == (theirs.routed_scaling_factor, theirs.norm_topk_prob)
    assert experts.layers == tuple(number >= theirs.first_k_dense_replace for number in range(4))
    if architecture == "DeepseekV3ForCausalLM":
        assert (experts.groups, experts.top_groups, experts.top_k) == (8, 4, 8)
    else:
        assert (experts.groups, experts.top_groups) == (0, 0)


@pytest.mark.parametrize(
    ("published", "change", "message"),
    [
        (V3, {"qk_rope_head_dim": 63}, "qk_rope_head_dim: 63 is odd"),
        (V3, {"kv_lora_rank": 1000}, "kv_lora_rank: 1000 and 64 rotated numbers are more than the 1024"),
        (V3, {"num_key_value_heads": 64}, "num_key_value_heads: 64 is not num_attention_heads 128"),
        (V3, {"q_lora_rank": "none"}, "q_lora_rank: 'none' is not an integer"),
        (V3, {"quantization_config": {"quant_method": "fp8"}}, "quantization_config: quantised"),
        (V3, {"auto_map": {"AutoModel": "modeling_mine.DeepseekV3ForCausalLM"}}, "auto_map: model directories"),
        (V3, {"auto_map": {"AutoModel": "other/repository--modeling_deepseek.X"}}, "auto_map: model directories"),
        (V3, {"auto_map": ["modeling_deepseek.X"]}, "auto_map: model directories"),
        (V3, {"mlp_bias": True}, "mlp_bias: this architecture has none"),
        (
            V2_LITE,
            {"rope_scaling": {**YARN, "mscale_all_dim": "1"}},
            "rope_scaling.mscale_all_dim: '1' is not a number",
        ),
    ],
)
def test_refusals(published, change, message):
    with pytest.raises(ModelError, match=r"^some/config.json: " + message):
        parse_config({**published, **change}, "some/config.json")
    assert not is_native({**published, **change})
