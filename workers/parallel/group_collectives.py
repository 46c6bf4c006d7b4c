"""The collectives of one rank, over a store that rank 0 serves: which ranks form which group.

Called by the assembly of a rank whose runner computes with torch; a rank of the oracle needs none of it. Of T × E
ranks, rank r is tensor rank r mod T of expert rank r div T: the T ranks that share one copy of the attention are
neighbours, and the E ranks with the same part of it exchange tokens for experts.
"""

from __future__ import annotations

from typing import Any

import torch

from penstock.workers.expert_ranks import ExpertRanks, ExpertSpread
from penstock.workers.parallel.collectives import Collectives
from penstock.workers.parallel.expert_losses import LossPolicy
from penstock.workers.parallel.follower import Follower
from penstock.workers.parallel.leader import GroupLeader
from penstock.workers.parallel.process_group import GroupPlace, join_store, open_group, serve_store
from penstock.workers.parallel.watched_collectives import WatchedCollectives
from penstock.workers.settings import WorkerSettings

_TIMEOUT_S = 60.0  # of one collective; the group's watch ends a stuck step long before
_MEET_S = 3.0  # for ranks that serve to meet anew: all come at once, or one of them is lost


def lead_store(leader: GroupLeader, settings: WorkerSettings) -> Any:
    """Serve the store and tell every follower where. Raises ConfigError, GroupError."""
    store, address = serve_store(settings.group.host, settings.group.start_timeout_s)
    leader.share_store(address)
    return store


def follow_store(follower: Follower, settings: WorkerSettings) -> Any:
    """The store of rank 0. Raises ConfigError, GroupError."""
    return join_store(follower.wait_store(), settings.group.start_timeout_s)


def open_tensor_group(
    member: GroupLeader | Follower, settings: WorkerSettings, store: Any, device: torch.device
) -> Collectives:
    """The ranks among which one copy of the layers is cut. Returns when they are connected. Raises GroupError."""
    group = settings.group
    expert_rank, rank = divmod(group.rank, group.tensor_parallel_size)
    name = f"{settings.worker_id}/{settings.incarnation}/tensor-{expert_rank}"
    place = GroupPlace(name, rank, group.tensor_parallel_size, group.host, _TIMEOUT_S)
    return WatchedCollectives(open_group(place, store, device), member.progress)


def open_expert_ranks(
    member: GroupLeader | Follower, settings: WorkerSettings, store: Any, device: torch.device
) -> ExpertRanks | None:
    """The ranks among which sequences and experts are spread; None where one rank, or one tensor group, has them all.

    Returns when they are connected. Raises GroupError.
    """
    group = settings.group
    if group.attention_ranks == 1:
        return None
    number, tensor_rank = divmod(group.rank, group.tensor_parallel_size)

    def meet(name: str, rank: int, width: int, beside: bool) -> Collectives:
        life = f"{settings.worker_id}/{settings.incarnation}/{name}-{tensor_rank}"
        # What runs beside steps must not spin for cores that steps want.
        meet_s = _MEET_S if member.serves else None
        place = GroupPlace(life, rank, width, group.host, _TIMEOUT_S, meet_s, share_memory=not beside)
        found = open_group(place, store, device)
        # What runs beside steps says nothing about where a step stands.
        return found if beside else WatchedCollectives(found, member.progress)

    attention = meet("attention", number, group.attention_ranks, False)
    if group.expert_parallel_size == 1:
        return ExpertRanks(attention, meet, None)
    spread = ExpertSpread(group.redundant_experts, group.expert_rebalance_steps, LossPolicy(group.lost_experts))
    return ExpertRanks(attention, meet, spread)
