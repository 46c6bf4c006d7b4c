"""How DeepSeek's families choose experts, from config.json: groups first, then experts of the best groups.

Called by `config.py`. Knows no files and no tensors. Sources: DeepSeek-V2, 2024, sections 2.2.1 and 2.2.2;
DeepSeek-V3, 2024, section 2.1.2 (scores by sigmoid, and a bias that counts for the choice only). Defaults are those of
transformers.
"""

from __future__ import annotations

from penstock.workers.model.expert_layers import MOST_WIDTH, ExpertLayers, expert_count
from penstock.workers.model.families import ExpertFamily, GroupLimited
from penstock.workers.model.fields import FieldReader

GREEDY, GROUPED, BIASED = "greedy", "group_limited_greedy", "noaux_tc"


def read_group_limited(
    fields: FieldReader, family: ExpertFamily, how: GroupLimited, num_layers: int, mlp_bias: bool
) -> ExpertLayers:
    """Raises ModelError naming the key, also where transformers would compute otherwise than the key says."""
    _refuse_unsupported(fields, how)
    count = expert_count(fields, family.count_keys, how.count)
    top_k = fields.integer("num_experts_per_tok", 1, count, default=how.top_k)
    groups, top_groups = _groups(fields, how, count, top_k)
    width = fields.integer(family.width_key, 1, MOST_WIDTH, default=how.width)
    first = fields.integer("first_k_dense_replace", 0, 1 << 10, default=how.first_dense)
    return ExpertLayers(
        layers=tuple(number >= first for number in range(num_layers)),
        count=count,
        top_k=top_k,
        width=width,
        renormalize=how.biased and fields.boolean("norm_topk_prob", default=True),
        shared_width=width * fields.integer("n_shared_experts", 1, 1 << 10, default=how.shared),
        names=family.names,
        scoring="sigmoid" if how.biased else "softmax",
        scaling=fields.number("routed_scaling_factor", 0.0, 1e6, default=how.scaling),
        groups=groups,
        top_groups=top_groups,
        selection_bias=how.biased,
        exact_router=True,
        shared_gate=False,
        shared_bias=mlp_bias,
    )


def _refuse_unsupported(fields: FieldReader, how: GroupLimited) -> None:
    scoring = "sigmoid" if how.biased else "softmax"
    if fields.raw.get("scoring_func", scoring) != scoring:
        raise fields.error("scoring_func", f"only {scoring!r} is supported with this architecture")
    if fields.raw.get("moe_layer_freq", 1) != 1:
        raise fields.error("moe_layer_freq", "only 1 is supported")
    if not how.biased and fields.raw.get("norm_topk_prob"):
        raise fields.error("norm_topk_prob", "only false is supported with this architecture")


def _groups(fields: FieldReader, how: GroupLimited, count: int, top_k: int) -> tuple[int, int]:
    """(groups of experts, how many of them a token may use); zeros where there are no groups."""
    methods = (BIASED,) if how.biased else (GREEDY, GROUPED)
    method = fields.raw.get("topk_method")
    if method is None:
        method = methods[0]
    if method not in methods:
        raise fields.error("topk_method", f"{method!r} is not supported; supported are {', '.join(methods)}")
    if method == GREEDY:
        return 0, 0
    groups = fields.integer("n_group", 1, count, default=how.groups)
    top_groups = fields.integer("topk_group", 1, groups, default=how.top_groups)
    if count % groups:
        raise fields.error("n_group", f"{groups} does not divide the {count} experts")
    if how.biased and count // groups < 2:
        raise fields.error("n_group", f"{groups} groups of {count} experts have no best two each")
    if top_k > top_groups * (count // groups):
        raise fields.error("topk_group", f"{top_groups} groups hold fewer experts than the {top_k} of a token")
    return groups, top_groups
