"""Which widths a model can be cut for, by its configuration."""

import json
import subprocess
import sys

import pytest

from penstock.workers.errors import ConfigError
from penstock.workers.model.implementation import choose_implementation
from penstock.workers.model.tensor_widths import require_tensor_width

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 96,
    "intermediate_size": 200,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "torch_dtype": "float32",
}
MIXTRAL = {**LLAMA, "architectures": ["MixtralForCausalLM"], "num_local_experts": 4, "num_experts_per_tok": 2}
QWEN2_MOE = {
    **LLAMA,
    "architectures": ["Qwen2MoeForCausalLM"],
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 3,
}
FOREIGN = {**LLAMA, "architectures": ["GPTNeoXForCausalLM"], "model_type": "gpt_neox"}


def config(raw):
    return choose_implementation("auto", raw, "config.json").config


@pytest.mark.parametrize(
    ("raw", "widths"), [(LLAMA, (1, 2, 6)), (MIXTRAL, (1, 2, 6)), (QWEN2_MOE, (1, 2)), (FOREIGN, (1,))]
)
def test_widths(raw, widths):
    for width in range(1, 13):
        if width in widths:
            require_tensor_width(config(raw), width)
        else:
            with pytest.raises(ConfigError, match=f"tensor_parallel_size {width}"):
                require_tensor_width(config(raw), width)


def test_refusals_say_the_numbers():
    with pytest.raises(ConfigError, match=r"does not divide the 6 attention heads; .* 1, 2, 6"):
        require_tensor_width(config(LLAMA), 4)
    with pytest.raises(ConfigError, match="above the 3 columns of the shared expert"):
        require_tensor_width(config(QWEN2_MOE), 6)
    with pytest.raises(ConfigError, match="GPTNeoXForCausalLM runs by the transformers backend, which has one rank"):
        require_tensor_width(config(FOREIGN), 2)


def test_it_needs_no_torch():
    code = "import sys, penstock.workers.model.tensor_widths; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert json.loads(done.stdout.lower()) is False
