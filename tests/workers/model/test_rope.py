"""Rotary tables against transformers' own, scalings and what they multiply cosine and sine with included."""

import pytest
import torch
from fakes.exactness import LLAMA3_ROPE
from transformers import Gemma3TextConfig, LlamaConfig
from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from penstock.workers.model.config import parse_config
from penstock.workers.model.rope import rope_tables

YARN = {"rope_type": "yarn", "factor": 8.0, "rope_theta": 10000.0, "original_max_position_embeddings": 1024}
ROPES = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "large theta": {"rope_type": "default", "rope_theta": 1000000.0},
    "linear": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
    "llama3 short": LLAMA3_ROPE,
    "llama3 as published": {**LLAMA3_ROPE, "original_max_position_embeddings": 4096},
    "dynamic": {"rope_type": "dynamic", "factor": 2.7, "rope_theta": 10000.0},
    "yarn": {**YARN},
    "yarn of a large theta": {**YARN, "rope_theta": 1000000.0, "factor": 2.5},
    "yarn with a factor of its own": {**YARN, "attention_factor": 0.7},
    "yarn with mscale": {**YARN, "mscale": 0.707, "mscale_all_dim": 1.2},
    "yarn with one mscale": {**YARN, "mscale": 0.707},
    "yarn with other bounds": {**YARN, "beta_fast": 16, "beta_slow": 2, "truncate": False},
    "yarn that meets itself": {**YARN, "beta_fast": 1.0, "beta_slow": 1.0, "original_max_position_embeddings": 16},
}


@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES.keys())
@pytest.mark.parametrize("dim", [48, 64, 128])
def test_tables_equal_transformers(rope, dim):
    theirs = LlamaConfig(
        hidden_size=dim * 2,
        num_attention_heads=2,
        head_dim=dim,
        rope_parameters=dict(rope),
        max_position_embeddings=8192,
    )
    theirs.architectures = ["LlamaForCausalLM"]
    config = parse_config(theirs.to_dict(), "config.json")
    require_equal(config.rope, dim, LlamaRotaryEmbedding(theirs)(torch.zeros(1), torch.arange(3000)[None]))


def require_equal(rope, dim, expected):
    for table, theirs in zip(rope_tables(rope, dim, 3000), expected, strict=True):
        torch.testing.assert_close(table, theirs[0, :, : dim // 2], atol=1e-6, rtol=0)


@pytest.mark.parametrize("rope", [ROPES["linear"], ROPES["yarn"], ROPES["llama3 as published"]])
def test_two_tables_equal_transformers(rope):
    theirs = Gemma3TextConfig(
        head_dim=48,
        max_position_embeddings=8192,
        num_hidden_layers=6,
        rope_parameters={
            "full_attention": dict(rope),
            "sliding_attention": {"rope_type": "linear", "factor": 3.0, "rope_theta": 5000.0},
        },
    )
    theirs.architectures = ["Gemma3ForCausalLM"]
    config, module = parse_config(theirs.to_dict(), "config.json"), Gemma3RotaryEmbedding(theirs)
    for ours, kind in ((config.rope, "full_attention"), (config.local_rope, "sliding_attention")):
        require_equal(ours, 48, module(torch.zeros(1), torch.arange(3000)[None], kind))
