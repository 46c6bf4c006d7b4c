"""config.json: both transformers generations are read, and what cannot be served is refused by name."""

import json

import pytest
from fakes.exactness import CheckpointSpec, make_checkpoint

from penstock.workers.errors import ModelError
from penstock.workers.model.config import RopeScaling, parse_config, read_config

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
    assert config.rope_theta == 500000.0
    assert config.rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)
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
    assert (config.tied_embeddings, config.attention_bias, config.dtype) == (True, True, "float32")


def test_old_names_and_defaults():
    raw = {
        k: v
        for k, v in LLAMA31.items()
        if k not in ("rope_scaling", "rope_theta", "num_key_value_heads", "torch_dtype")
    }
    config = parse_config(raw, "config.json")
    assert (config.rope_theta, config.rope_scaling, config.num_kv_heads, config.dtype) == (10000.0, None, 32, "float32")
    raw["rope_scaling"] = {"type": "linear", "factor": 2.0}
    assert parse_config(raw, "config.json").rope_scaling == RopeScaling("linear", 2.0)


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
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2}}, "rope_scaling.rope_type: 'yarn' is not supported"),
        ({"rope_scaling": {"rope_type": ["linear"]}}, "rope_scaling.rope_type: \\['linear'\\] is not supported"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2}}, "rope_scaling.low_freq_factor: missing"),
        (
            {"rope_scaling": {**LLAMA31["rope_scaling"], "high_freq_factor": 1.0}},
            "rope_scaling.high_freq_factor: 1.0 must",
        ),
        ({"rope_scaling": [1]}, "rope_scaling: must be an object"),
        (
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "rope_parameters.partial_rotary_factor: only 1.0",
        ),
        ({"hidden_act": "gelu"}, "hidden_act: 'gelu' is not supported"),
        ({"use_sliding_window": True}, "use_sliding_window: "),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types: only full_attention"),
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
