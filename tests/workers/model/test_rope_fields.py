"""Rotary embedding as config.json says it: which key wins, what a missing one means, and what is refused."""

import pytest

from penstock.workers.errors import ModelError
from penstock.workers.model.families import FAMILIES
from penstock.workers.model.fields import FieldReader
from penstock.workers.model.rope_fields import Rope, RopeScaling, read_ropes

LINEAR = RopeScaling("linear", 2.0)
TWO = {
    "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 7.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 5.0},
}


def ropes(raw, architecture="LlamaForCausalLM"):
    return read_ropes(FieldReader(raw, "config.json"), FAMILIES[architecture], 4096)


@pytest.mark.parametrize(
    ("raw", "rope"),
    [
        ({}, Rope(10000.0)),
        ({"rope_theta": 5.0, "rope_scaling": None, "rope_parameters": None}, Rope(5.0)),
        ({"rope_theta": 5.0, "rope_parameters": {"rope_type": "default"}}, Rope(5.0)),
        ({"rope_theta": 5.0, "rope_parameters": {"rope_theta": 7.0}}, Rope(7.0)),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, Rope(10000.0, LINEAR)),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": 2}, "rope_parameters": {"rope_theta": 7.0}},
            Rope(10000.0, LINEAR),
        ),
        ({"rope_scaling": {}, "rope_parameters": {"rope_theta": 7.0}}, Rope(7.0)),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, Rope(10000.0)),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
            Rope(10000.0, RopeScaling("yarn", 4.0, original_positions=4096)),
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": None, "original_max_position_embeddings": 1024}},
            Rope(10000.0, RopeScaling("yarn", 4.0, original_positions=1024)),
        ),
        (
            {
                "original_max_position_embeddings": 512,
                "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024},
            },
            Rope(10000.0, RopeScaling("yarn", 4.0, original_positions=512)),
        ),
    ],
)
def test_one_for_all_layers(raw, rope):
    assert ropes(raw) == (rope, None)


@pytest.mark.parametrize(
    ("raw", "full", "local"),
    [
        ({}, Rope(1000000.0), Rope(10000.0)),
        ({"rope_theta": 5.0, "rope_local_base_freq": 3.0}, Rope(5.0), Rope(3.0)),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2}}, Rope(1000000.0, LINEAR), Rope(10000.0)),
        ({"rope_parameters": TWO}, Rope(7.0, LINEAR), Rope(5.0)),
        ({"rope_parameters": {"full_attention": {"rope_theta": 7.0}}}, Rope(7.0), Rope(10000.0)),
    ],
)
def test_one_for_each_kind_of_layer(raw, full, local):
    assert ropes(raw, "Gemma3ForCausalLM") == (full, local)


@pytest.mark.parametrize(
    ("architecture", "raw", "message"),
    [
        ("Qwen2ForCausalLM", {"rope_parameters": TWO}, "rope_parameters.full_attention: this architecture has one"),
        ("LlamaForCausalLM", {"partial_rotary_factor": 0.5}, "partial_rotary_factor: only 1.0"),
        ("LlamaForCausalLM", {"rope_scaling": {"rope_type": "dynamic"}}, "rope_scaling.factor: missing"),
        ("LlamaForCausalLM", {"rope_scaling": {"rope_type": "linear", "factor": 0.5}}, "rope_scaling.factor: 0.5 is"),
        (
            "LlamaForCausalLM",
            {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "truncate": "no"}},
            "rope_scaling.truncate: 'no' is not true or false",
        ),
        ("Gemma3ForCausalLM", {"rope_parameters": {"rope_theta": 5.0}}, "rope_parameters.rope_theta: expected only"),
        (
            "Gemma3ForCausalLM",
            {"rope_parameters": TWO, "rope_scaling": {"rope_type": "default"}},
            "rope_scaling: given together",
        ),
        ("Gemma3ForCausalLM", {"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling.type: must be called"),
        (
            "Gemma3ForCausalLM",
            {"rope_parameters": {"full_attention": {"rope_type": "yarn", "factor": 2.0, "truncate": False}}},
            "rope_parameters.full_attention.truncate: only true",
        ),
    ],
)
def test_refusals(architecture, raw, message):
    with pytest.raises(ModelError, match="^config.json: " + message):
        ropes(raw, architecture)
