"""How DeepSeek's families choose experts: as published, by method, and refusals by key."""

import pytest

from penstock.workers.errors import ModelError
from penstock.workers.model.families import FAMILIES
from penstock.workers.model.fields import FieldReader
from penstock.workers.model.group_limited import read_group_limited

V2 = {
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 1536,
    "n_group": 8,
    "n_routed_experts": 160,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "routed_scaling_factor": 16.0,
    "topk_group": 3,
    "topk_method": "group_limited_greedy",
}
V3 = {
    "first_k_dense_replace": 3,
    "moe_intermediate_size": 2048,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_experts_per_tok": 8,
    "routed_scaling_factor": 2.5,
    "topk_group": 4,
    "topk_method": "noaux_tc",
}


def read(version, raw, num_layers=5, mlp_bias=False):
    family = FAMILIES[f"DeepseekV{version}ForCausalLM"].experts
    fields = FieldReader(raw, "config.json")
    return read_group_limited(fields, family, family.group_limited, num_layers, mlp_bias)


def test_v2_as_published():
    how = read(2, V2)
    assert how.layers == (False, True, True, True, True)
    assert (how.count, how.top_k, how.width, how.shared_width) == (160, 6, 1536, 3072)
    assert (how.scoring, how.scaling, how.renormalize, how.selection_bias) == ("softmax", 16.0, False, False)
    assert (how.groups, how.top_groups) == (8, 3)
    assert (how.exact_router, how.shared_gate, how.shared_bias) == (True, False, False)


def test_v3_as_published():
    how = read(3, V3)
    assert how.layers == (False, False, False, True, True)
    assert (how.count, how.top_k, how.width, how.shared_width) == (256, 8, 2048, 2048)
    assert (how.scoring, how.scaling, how.renormalize, how.selection_bias) == ("sigmoid", 2.5, True, True)
    assert (how.groups, how.top_groups) == (8, 4)
    assert not read(3, {**V3, "norm_topk_prob": False}).renormalize


def test_greedy_ignores_groups():
    assert read(2, {**V2, "topk_method": "greedy", "n_group": 7}).groups == 0
    assert read(2, {**V2, "topk_method": None}).groups == 0


def test_shared_experts_have_the_biases_of_the_blocks():
    assert read(2, V2, mlp_bias=True).shared_bias


def test_no_layer_needs_experts():
    assert read(3, {**V3, "first_k_dense_replace": 9}).layers == (False,) * 5


@pytest.mark.parametrize(
    ("version", "change", "message"),
    [
        (2, {"topk_method": "noaux_tc"}, "topk_method: 'noaux_tc' is not supported; supported are greedy, group"),
        (3, {"topk_method": "greedy"}, "topk_method: 'greedy' is not supported; supported are noaux_tc"),
        (2, {"scoring_func": "sigmoid"}, "scoring_func: only 'softmax'"),
        (3, {"scoring_func": "softmax"}, "scoring_func: only 'sigmoid'"),
        (2, {"norm_topk_prob": True}, "norm_topk_prob: only false"),
        (2, {"moe_layer_freq": 2}, "moe_layer_freq: only 1"),
        (2, {"n_group": 7}, "n_group: 7 does not divide the 160 experts"),
        (2, {"n_group": None}, "n_group: missing"),
        (2, {"topk_group": 9}, "topk_group: 9 is not in 1 .. 8"),
        (3, {"n_group": 256, "topk_group": 8}, "n_group: 256 groups of 256 experts have no best two"),
        (3, {"topk_group": 1, "num_experts_per_tok": 33}, "topk_group: 1 groups hold fewer experts than the 33"),
        (3, {"num_experts_per_tok": 257}, "num_experts_per_tok: 257 is not in 1 .. 256"),
        (2, {"num_experts": 64}, "num_experts: 64 contradicts n_routed_experts 160"),
        (3, {"n_shared_experts": 0}, "n_shared_experts: 0 is not in"),
        (3, {"routed_scaling_factor": -1.0}, "routed_scaling_factor: -1.0 is not in"),
        (3, {"first_k_dense_replace": -1}, "first_k_dense_replace: -1 is not in"),
    ],
)
def test_refusals(version, change, message):
    with pytest.raises(ModelError, match="^config.json: " + message):
        read(version, {**(V2 if version == 2 else V3), **change})
