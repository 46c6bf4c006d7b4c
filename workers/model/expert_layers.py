"""Which layers of a model are mixtures of experts, how many experts and how a token's are chosen, from config.json.

Called by `config.py`; `loading.py` and `decoder.py` read the result. Knows no files and no tensors.
"""

from __future__ import annotations

from dataclasses import dataclass

from penstock.workers.model.families import ExpertNames, Family
from penstock.workers.model.fields import FieldReader

MOST_EXPERTS = 1 << 12
MOST_WIDTH = 1 << 20


@dataclass(frozen=True, slots=True)
class ExpertLayers:
    """The experts of every layer that has some."""

    layers: tuple[bool, ...]  # per layer; the others have a dense feed-forward block
    count: int
    top_k: int  # of a token
    width: int  # of one expert
    renormalize: bool  # the chosen experts' probabilities are divided by their sum
    shared_width: int  # of the expert that serves every token; 0 = there is none
    names: ExpertNames
    scoring: str = "softmax"  # or "sigmoid"
    scaling: float = 1.0  # of the chosen experts' weights
    groups: int = 0  # equal runs of experts; 0 = there are none
    top_groups: int = 0  # of them that a token may use
    selection_bias: bool = False  # a number for each expert is added to its score for the choice only
    exact_router: bool = False  # logits are float32, whatever the model's dtype
    shared_gate: bool = True  # the shared expert is weighted by a gate of its own
    shared_bias: bool = False  # its projections have biases


def read_experts(fields: FieldReader, family: Family, num_layers: int) -> ExpertLayers | None:
    """None where the family has no experts. Raises ModelError naming the key."""
    how = family.experts
    if how is None:
        return None
    count = expert_count(fields, how.count_keys)
    shared = fields.integer("shared_expert_intermediate_size", 1, MOST_WIDTH) if how.shared else 0
    renormalize = how.renormalize
    return ExpertLayers(
        layers=_layers(fields, num_layers) if how.some_dense else (True,) * num_layers,
        count=count,
        top_k=fields.integer("num_experts_per_tok", 1, count),
        width=fields.integer(how.width_key, 1, MOST_WIDTH),
        renormalize=fields.boolean("norm_topk_prob", default=False) if renormalize is None else renormalize,
        shared_width=shared,
        names=how.names,
    )


def expert_count(fields: FieldReader, keys: tuple[str, ...], default: int | None = None) -> int:
    """The one number that every given key says."""
    given = [key for key in keys if fields.raw.get(key) is not None]
    counts = {key: fields.integer(key, 1, MOST_EXPERTS, default) for key in given or keys[:1]}
    first, *others = counts
    for key in others:
        if counts[key] != counts[first]:
            raise fields.error(key, f"{counts[key]} contradicts {first} {counts[first]}")
    return counts[first]


def _layers(fields: FieldReader, num_layers: int) -> tuple[bool, ...]:
    """Every `decoder_sparse_step`-th layer has experts, but for those that `mlp_only_layers` lists."""
    step = fields.integer("decoder_sparse_step", 1, 1 << 10, default=1)
    dense = fields.raw.get("mlp_only_layers")
    if dense is None:
        dense = []
    if not isinstance(dense, list) or not all(type(number) is int and 0 <= number < num_layers for number in dense):
        raise fields.error("mlp_only_layers", f"must be a list of layer numbers below {num_layers}")
    return tuple((number + 1) % step == 0 and number not in dense for number in range(num_layers))
