"""Which layers have which experts: transformers' keys, defaults and names, and refusals by key."""

import pytest

from penstock.workers.errors import ModelError
from penstock.workers.model.expert_layers import read_experts
from penstock.workers.model.families import FAMILIES, ExpertNames
from penstock.workers.model.fields import FieldReader

QWEN3 = {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True}
QWEN2 = {**QWEN3, "num_experts": 60, "shared_expert_intermediate_size": 5632}
MIXTRAL = {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 14336}


def read(architecture, raw, num_layers=4):
    return read_experts(FieldReader(raw, "config.json"), FAMILIES[f"{architecture}ForCausalLM"], num_layers)


def test_dense_families_have_none():
    assert read("Qwen3", QWEN3) is None


def test_qwen3():
    experts = read("Qwen3Moe", QWEN3)
    assert (experts.count, experts.top_k, experts.width, experts.shared_width) == (128, 8, 768, 0)
    assert experts.layers == (True,) * 4
    assert experts.renormalize
    assert not read("Qwen3Moe", {**QWEN3, "norm_topk_prob": None}).renormalize
    assert experts.names == ExpertNames()


def test_transformers_5_calls_the_number_otherwise():
    renamed = {"num_local_experts": 128, **{key: value for key, value in QWEN3.items() if key != "num_experts"}}
    assert read("Qwen3Moe", renamed) == read("Qwen3Moe", QWEN3)
    assert read("Qwen3Moe", {**renamed, "num_experts": 128}) == read("Qwen3Moe", QWEN3)


def test_mixtral_always_renormalises_and_every_layer_has_experts():
    experts = read("Mixtral", {**MIXTRAL, "norm_topk_prob": False, "mlp_only_layers": [0], "decoder_sparse_step": 2})
    assert (experts.count, experts.top_k, experts.width, experts.renormalize) == (8, 2, 14336, True)
    assert experts.layers == (True,) * 4
    assert experts.names == ExpertNames("block_sparse_moe.", "w1", "w3", "w2")


def test_qwen2_has_a_shared_expert():
    experts = read("Qwen2Moe", {**QWEN2, "norm_topk_prob": False})
    assert (experts.count, experts.shared_width, experts.renormalize) == (60, 5632, False)


@pytest.mark.parametrize(
    ("change", "layers"),
    [
        ({"decoder_sparse_step": 1, "mlp_only_layers": []}, (True, True, True, True, True)),
        ({"decoder_sparse_step": 2}, (False, True, False, True, False)),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [3]}, (False, True, False, False, False)),
        ({"mlp_only_layers": [0, 4]}, (False, True, True, True, False)),
        ({"mlp_only_layers": [0, 1, 2, 3, 4]}, (False,) * 5),
        ({"decoder_sparse_step": 9}, (False,) * 5),
    ],
)
def test_layers_that_stay_dense(change, layers):
    assert read("Qwen3Moe", {**QWEN3, **change}, 5).layers == layers


@pytest.mark.parametrize(
    ("architecture", "raw", "message"),
    [
        ("Qwen3Moe", {**QWEN3, "num_experts": None}, "num_experts: missing"),
        ("Qwen3Moe", {**QWEN3, "num_experts": 0}, "num_experts: 0 is not in 1"),
        ("Qwen3Moe", {**QWEN3, "num_local_experts": 64}, "num_local_experts: 64 contradicts num_experts 128"),
        ("Qwen3Moe", {**QWEN3, "num_experts_per_tok": 129}, "num_experts_per_tok: 129 is not in 1 .. 128"),
        ("Qwen3Moe", {**QWEN3, "num_experts_per_tok": 0}, "num_experts_per_tok: 0 is not in 1 .. 128"),
        ("Qwen3Moe", {**QWEN3, "moe_intermediate_size": "768"}, "moe_intermediate_size: '768' is not an integer"),
        ("Qwen3Moe", {**QWEN3, "norm_topk_prob": 1}, "norm_topk_prob: 1 is not true or false"),
        ("Qwen3Moe", {**QWEN3, "decoder_sparse_step": 0}, "decoder_sparse_step: 0 is not in 1"),
        ("Qwen3Moe", {**QWEN3, "mlp_only_layers": [4]}, "mlp_only_layers: must be a list of layer numbers below 4"),
        ("Qwen3Moe", {**QWEN3, "mlp_only_layers": [True]}, "mlp_only_layers: must be a list"),
        ("Qwen3Moe", {**QWEN3, "mlp_only_layers": 1}, "mlp_only_layers: must be a list"),
        ("Mixtral", {**MIXTRAL, "num_local_experts": None}, "num_local_experts: missing"),
        ("Mixtral", {**MIXTRAL, "num_experts_per_tok": 9}, "num_experts_per_tok: 9 is not in 1 .. 8"),
        ("Qwen2Moe", {**QWEN3, "shared_expert_intermediate_size": None}, "shared_expert_intermediate_size: missing"),
        ("Qwen2Moe", {**QWEN2, "num_experts": None, "num_local_experts": 60}, "num_experts: missing"),
    ],
)
def test_refusals_name_file_and_key(architecture, raw, message):
    with pytest.raises(ModelError, match=r"^config.json: " + message):
        read(architecture, raw)
