"""One rank's place among the expert ranks of a worker, and its experts out of a checkpoint.

Called by `model_build.py` when a rank of a group with expert ranks loads its model. Every expert rank attends for its
own sequences and holds some experts of every layer; `parallel/expert_parallel.py` does the rest.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from penstock.workers.errors import ConfigError
from penstock.workers.model.checkpoint import Checkpoint
from penstock.workers.model.checkpoint_experts import CheckpointExperts
from penstock.workers.model.config import DecoderConfig
from penstock.workers.parallel.collectives import Collectives
from penstock.workers.parallel.expert_losses import LossPolicy
from penstock.workers.parallel.expert_parallel import ExpertParallel, ExpertPolicy, ExpertRank, Meet
from penstock.workers.parallel.expert_planner import PlacementLimits
from penstock.workers.parallel.expert_weights import ExpertShape
from penstock.workers.parallel.shards import TensorShard

KEY = "expert_parallel_size"
_HALF_LIFE_STEPS = 256  # of the observed load, where nothing is levelled by it


@dataclass(frozen=True, slots=True)
class ExpertSpread:
    """How a worker's experts lie on its ranks."""

    redundant: int = 0  # slots of each rank and layer beyond those that hold every expert once
    rebalance_steps: int = 256  # look at the load so often; 0 = never
    losses: LossPolicy = LossPolicy.REFUSE


@dataclass(frozen=True, slots=True)
class ExpertRanks:
    """Who this rank is: its `attention` group has one rank of every copy of the attention layers."""

    attention: Collectives  # brings hidden states together, and stands for this rank's number
    meet: Meet  # opens a group of these ranks under another name
    spread: ExpertSpread | None = field(default_factory=ExpertSpread)  # None: each copy has all experts


def spread_experts(
    config: DecoderConfig, checkpoint: Checkpoint, dtype: torch.dtype, shard: TensorShard, ranks: ExpertRanks
) -> ExpertParallel | None:
    """This rank's experts, loaded, with all other ranks met; None where it is to have all of them itself.

    Raises ConfigError, ModelError, GroupError.
    """
    how, width = config.experts, ranks.attention.width
    if ranks.spread is None:
        return None
    if how is None:
        raise ConfigError(f"{KEY} {width}: the model has no experts", KEY)
    if how.count < width:
        raise ConfigError(f"{KEY} {width} is above the model's {how.count} experts", KEY)
    shape = ExpertShape(sum(how.layers), how.count, len(shard.columns(how.width)), config.hidden_size, dtype)
    spread = ranks.spread
    slots = min(how.count, -(-how.count // width) + spread.redundant)
    # More copies than one are worth their slots where there are slots to spare; hot experts come first.
    limits = PlacementLimits(slots, least_copies=2 if slots * width >= 2 * how.count else 1)
    # What was asked before the placement last changed is soon forgotten, by the planner and by the figures.
    half_life = float(spread.rebalance_steps or _HALF_LIFE_STEPS)
    policy = ExpertPolicy(limits, spread.rebalance_steps, half_life, spread.losses)
    source = CheckpointExperts(how, config.hidden_size, checkpoint, dtype, shard)
    experts = ExpertParallel(ExpertRank(ranks.attention.rank, width), shape, source, policy, ranks.meet)
    experts.regroup(tuple(range(width)), epoch=0)
    return experts
