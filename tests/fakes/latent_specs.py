"""Checkpoints of the families that keep latent rows: every way to choose experts, to rotate and to make queries."""

from __future__ import annotations

import json
from typing import Any

from fakes.exactness import CheckpointSpec

_YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 16.0, "original_max_position_embeddings": 64}


def latent_specs() -> list[CheckpointSpec]:
    """Five: two of DeepSeek-V2, three of V3; stored widths that no vector divides among them."""
    yarn2 = {"rope_parameters": {**_YARN, "mscale": 0.7, "mscale_all_dim": 1.2}}
    yarn3 = {"rope_parameters": {**_YARN, "mscale": 1.0, "mscale_all_dim": 1.0}}
    few = {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
    many = {"n_routed_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 32}
    groups = {"n_group": 4, "topk_group": 2}
    limited = {"topk_method": "group_limited_greedy", "routed_scaling_factor": 2.0, **groups}
    biases = {"attention_bias": True, "mlp_bias": True}
    single = {
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.5,
        "attention_bias": True,
    }
    narrow = {"kv_lora_rank": 50, "qk_nope_head_dim": 28, "v_head_dim": 20}
    wide = {"kv_lora_rank": 96, "qk_nope_head_dim": 32, "v_head_dim": 48}
    rows: list[tuple[str, int, int, int, bool, dict[str, Any]]] = [
        ("deepseek-v2", 6, 16, 2, False, {**few, **narrow, "q_lora_rank": None, "first_k_dense_replace": 1}),
        ("deepseek-v2", 4, 32, 2, False, {**many, **wide, **limited, **biases, **yarn2, "q_lora_rank": 72}),
        ("deepseek-v3", 8, 32, 2, False, {**many, **wide, **groups, **yarn3, "q_lora_rank": 64, "n_shared_experts": 2}),
        ("deepseek-v3", 5, 16, 3, True, {**few, **narrow, **single, "q_lora_rank": None, "rope_interleave": False}),
        ("deepseek-v3", 16, 8, 2, False, {**many, **narrow, **groups, "q_lora_rank": 33, "attention_bias": True}),
    ]
    return [
        CheckpointSpec(
            family,
            heads,
            heads,
            rope_dim,
            layers,
            tied=tied,
            seed={2: 102, 4: 97}.get(number, 90 + number),  # 92 has near-ties, 94 soon repeats itself
            changes=json.dumps({"first_k_dense_replace": layers - 1, **changes, "qk_rope_head_dim": rope_dim}),
        )
        for number, (family, heads, rope_dim, layers, tied, changes) in enumerate(rows)
    ]
