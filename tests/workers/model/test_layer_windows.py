"""Which layers slide: each family's own rule, and `layer_types` where it is given."""

import pytest

from penstock.workers.model.families import FAMILIES
from penstock.workers.model.fields import FieldReader
from penstock.workers.model.layer_windows import layer_windows

FULL, SLIDES = "full_attention", "sliding_attention"


def windows(architecture, num_layers=4, **raw):
    return layer_windows(FieldReader(raw, "config.json"), FAMILIES[architecture + "ForCausalLM"], num_layers)


@pytest.mark.parametrize(
    ("architecture", "raw", "expected"),
    [
        ("Llama", {}, (0, 0, 0, 0)),
        ("Llama", {"sliding_window": 8, "layer_types": [FULL] * 4}, (0, 0, 0, 0)),
        ("Mistral", {}, (4096,) * 4),
        ("Mistral", {"sliding_window": 8, "layer_types": [SLIDES] * 4}, (8,) * 4),
        ("Mistral", {"sliding_window": None}, (0, 0, 0, 0)),
        ("Qwen2", {"sliding_window": 8}, (0, 0, 0, 0)),
        ("Qwen2", {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1}, (0, 8, 8, 8)),
        ("Qwen2", {"sliding_window": 8, "use_sliding_window": True}, (0, 0, 0, 0)),  # from layer 28 on
        ("Qwen2", {"sliding_window": None, "use_sliding_window": True, "max_window_layers": 0}, (0, 0, 0, 0)),
        ("Qwen3", {"use_sliding_window": True, "layer_types": [SLIDES, FULL, FULL, SLIDES]}, (4096, 0, 0, 4096)),
        ("Qwen3Moe", {"sliding_window": 8, "max_window_layers": 2}, (0, 0, 0, 0)),
        ("Qwen3Moe", {"sliding_window": 8, "max_window_layers": 2, "use_sliding_window": True}, (8, 8, 8, 8)),
        ("Qwen3Moe", {"use_sliding_window": True}, (4096,) * 4),
        ("Mixtral", {}, (0, 0, 0, 0)),
        ("Mixtral", {"sliding_window": 8}, (8, 8, 8, 8)),
        ("Gemma2", {"sliding_window": 8}, (8, 0, 8, 0)),
        ("Gemma2", {"sliding_window": 8, "layer_types": [FULL, FULL, SLIDES, FULL]}, (0, 0, 8, 0)),
        ("Gemma3", {"sliding_window": 8}, (8, 8, 8, 8)),
        ("Gemma3", {"sliding_window": 8, "sliding_window_pattern": 3}, (8, 8, 0, 8)),
        ("Gemma3", {"sliding_window": None, "layer_types": [FULL] * 4}, (0, 0, 0, 0)),
    ],
)
def test_windows(architecture, raw, expected):
    assert windows(architecture, **raw) == expected
