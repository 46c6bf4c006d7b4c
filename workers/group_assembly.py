"""Joins the ranks of a group to one worker: what rank 0 has beside a worker of one rank, and how a follower is made.

Called by `assembly.py` for rank 0, and by `process.py` or an actor for a follower. The parts are those of
`parallel/`; torch is imported only for models.
"""

from __future__ import annotations

import dataclasses
import gc
import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from penstock.workers.computing import Computing, RankGroup, build_computing
from penstock.workers.errors import ConfigError
from penstock.workers.kv.layout import KVLayout
from penstock.workers.parallel.attention_ranks import Banks
from penstock.workers.parallel.follower import Follower, FollowerParts
from penstock.workers.parallel.group_messages import Joined, SessionOver
from penstock.workers.parallel.group_runner import GroupRunner
from penstock.workers.parallel.group_transfer import GroupRanks, GroupTransfer
from penstock.workers.parallel.leader import GroupLeader
from penstock.workers.parallel.oracle_sums import FollowerSums, LeaderSums
from penstock.workers.parallel.shards import TensorShard
from penstock.workers.settings import WorkerSettings
from penstock.workers.transfer.engine import TransferEngine
from penstock.workers.transfer.faults import TransferFaults
from penstock.workers.transfer.host import host_id

if TYPE_CHECKING:
    import torch

    from penstock.workers.expert_ranks import ExpertRanks
    from penstock.workers.parallel.collectives import Collectives

log = logging.getLogger(__name__)


def lead_computing(settings: WorkerSettings, leader: GroupLeader) -> Computing:
    """Wait for the followers, then load this rank; the runner is that of the group. Raises ConfigError, GroupError."""
    leader.meet()

    def collectives(device: torch.device) -> tuple[Collectives, ExpertRanks | None]:
        # Late: it imports torch.
        from penstock.workers.parallel.group_collectives import lead_store, open_expert_ranks, open_tensor_group

        store = lead_store(leader, settings)
        tensor = open_tensor_group(leader, settings, store, device)
        return tensor, open_expert_ranks(leader, settings, store, device)

    own = build_computing(settings, RankGroup(_shard(settings), LeaderSums(leader), collectives))
    return dataclasses.replace(own, runner=GroupRunner(own.runner, leader))


def complete_group(settings: WorkerSettings, leader: GroupLeader, computing: Computing) -> int:
    """All ranks have loaded: the number of blocks that all have. Raises ConfigError, GroupError."""
    num_blocks = leader.complete(fingerprint(computing.layout), computing.storage.num_blocks)
    return use_banks(settings, computing, num_blocks)


def rank_transfer(
    settings: WorkerSettings, computing: Computing, wake: Callable[[], None], faults: TransferFaults | None = None
) -> TransferEngine:
    """KV transfer into and out of this rank's storage. Raises ConfigError."""
    layout = computing.layout
    return TransferEngine(
        settings.transfer,
        computing.storage,
        worker_id=settings.worker_id,
        epoch=settings.incarnation,
        host_id=host_id(),
        compatibility=layout.compatibility,
        cluster_key=settings.cluster_key,
        wake=wake,
        clock=time.monotonic,
        faults=faults,
        share=layout.share,
        pieces=layout.pieces,
    )


def lead_transfer(
    settings: WorkerSettings, leader: GroupLeader, own: TransferEngine, bank_blocks: int, wake: Callable[[], None]
) -> GroupTransfer:
    """The transfer of the whole group, for the engine thread that `wake` wakes."""
    ranks = GroupRanks(leader.width // attention_ranks(settings), bank_blocks)
    transfer = GroupTransfer(own, ranks, leader.sender.send)

    def heard(rank: int, over: SessionOver) -> None:
        transfer.heard(rank, over)
        wake()

    leader.on_session_over = heard
    return transfer


def build_follower(settings: WorkerSettings, follower: Follower) -> FollowerParts:
    """Load this rank and wait for the others. Raises ConfigError, ModelError, GroupError."""
    began = time.monotonic()

    def collectives(device: torch.device) -> tuple[Collectives, ExpertRanks | None]:
        from penstock.workers.parallel.group_collectives import follow_store, open_expert_ranks, open_tensor_group

        store = follow_store(follower, settings)
        tensor = open_tensor_group(follower, settings, store, device)
        return tensor, open_expert_ranks(follower, settings, store, device)

    computing = build_computing(settings, RankGroup(_shard(settings), FollowerSums(follower), collectives))
    storage, layout = computing.storage, computing.layout
    transfer = rank_transfer(settings, computing, follower.wake)
    joined = Joined(fingerprint(layout), storage.num_blocks, transfer.address)
    num_blocks = use_banks(settings, computing, follower.complete(joined, transfer))
    took = time.monotonic() - began
    log.info("rank %d of %d serves %d blocks after %.2f s", follower.rank, follower.width, num_blocks, took)
    gc.collect()
    gc.freeze()  # as in rank 0: what is loaded stays
    bank = settings.group.rank // settings.group.tensor_parallel_size if attention_ranks(settings) > 1 else 0
    address = "" if computing.supply is None else computing.supply.address
    return FollowerParts(computing.runner, storage.generations[:num_blocks], transfer, bank, weights_address=address)


def attention_ranks(settings: WorkerSettings) -> int:
    """Ranks that attend for sequences of their own; each has a bank of KV blocks. The oracle has none."""
    return settings.group.attention_ranks if settings.runner.kind == "model" else 1


def bank_addresses(own: str, leader: GroupLeader | None, banks: int) -> tuple[tuple[str, ...], ...]:
    """Where each bank's ranks take KV blocks, in order. `own` is rank 0's."""
    every = (own,) if leader is None else (own, *leader.transfer_addresses)
    width = len(every) // banks
    return tuple(every[bank * width : (bank + 1) * width] for bank in range(banks))


def use_banks(settings: WorkerSettings, computing: Computing, num_blocks: int) -> int:
    """Of the blocks that every rank has, how many are in its bank; the others are for prompts that ranks share.

    Raises ConfigError where a bank cannot hold one sequence.
    """
    group, model = settings.group, computing.model
    if model is None or attention_ranks(settings) == 1:
        return num_blocks
    needed = computing.layout.blocks_for(settings.scheduler.max_model_len)
    shares = group.context_parallel_size > 1 and group.context_parallel_threshold > 0
    banks = Banks(num_blocks - needed, needed, group.context_parallel_threshold) if shares else Banks(num_blocks)
    if banks.blocks < needed:
        raise ConfigError(
            f"a rank has {num_blocks} KV blocks, of which {banks.scratch} are for prompts that all ranks compute; one "
            f"sequence of max_model_len {settings.scheduler.max_model_len} needs {needed} more: give more KV memory or "
            "lower max_model_len",
            "kv.num_blocks" if settings.kv.num_blocks else "kv.memory_bytes",
        )
    model.use_banks(banks)
    return banks.blocks


def fingerprint(layout: KVLayout) -> str:
    """What must be equal on all ranks, readable: the checkpoint's revision, and the shape of a rank's KV."""
    return (
        f"revision {layout.revision}, {layout.num_layers} layers, {layout.num_kv_heads} KV heads of {layout.head_dim} "
        f"per rank, blocks of {layout.block_size} tokens in {layout.dtype}"
    )


def _shard(settings: WorkerSettings) -> TensorShard:
    """Which part of the KV this rank holds."""
    group = settings.group
    if settings.runner.kind == "oracle":  # it has no experts: all ranks share its heads
        return TensorShard(group.rank, group.width)
    return TensorShard(group.rank % group.tensor_parallel_size, group.tensor_parallel_size)
