"""Rotary tables against transformers' own."""

import pytest
import torch
from fakes.exactness import LLAMA3_ROPE
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from penstock.workers.model.config import parse_config
from penstock.workers.model.rope import rope_tables

ROPES = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "large theta": {"rope_type": "default", "rope_theta": 1000000.0},
    "linear": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
    "llama3 short": LLAMA3_ROPE,
    "llama3 as published": {**LLAMA3_ROPE, "original_max_position_embeddings": 8192},
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
    cos, sin = rope_tables(config, 3000)
    expected = LlamaRotaryEmbedding(theirs)(torch.zeros(1), torch.arange(3000)[None])
    torch.testing.assert_close(cos, expected[0][0, :, : dim // 2], atol=1e-6, rtol=0)
    torch.testing.assert_close(sin, expected[1][0, :, : dim // 2], atol=1e-6, rtol=0)
