"""Joins the ranks of a group to one worker: what rank 0 has beside a worker of one rank, and how a follower is made.

Called by `assembly.py` for rank 0, and by `process.py` or an actor for a follower. The parts are those of
`parallel/`; torch is imported only for models.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from penstock.workers import fault_points
from penstock.workers.computing import Computing, RankGroup, build_computing
from penstock.workers.errors import ConfigError
from penstock.workers.kv.layout import KVLayout
from penstock.workers.parallel.expert_load import skew
from penstock.workers.parallel.follower import Follower, FollowerParts
from penstock.workers.parallel.group_messages import Joined, MeetAgain, PumpExperts, PutUpdate, SessionOver
from penstock.workers.parallel.group_runner import GroupRunner
from penstock.workers.parallel.group_transfer import GroupRanks, GroupTransfer
from penstock.workers.parallel.leader import GroupLeader
from penstock.workers.parallel.oracle_sums import FollowerSums, LeaderSums
from penstock.workers.parallel.rank_progress import RankProgress
from penstock.workers.parallel.shards import TensorShard
from penstock.workers.settings import WorkerSettings
from penstock.workers.tls import open_peer_tls
from penstock.workers.totals import GroupTotals
from penstock.workers.transfer.engine import TransferEngine
from penstock.workers.transfer.host import host_id

if TYPE_CHECKING:
    import torch

    from penstock.workers.expert_ranks import ExpertRanks
    from penstock.workers.parallel.collectives import Collectives
    from penstock.workers.parallel.expert_parallel import ExpertParallel
    from penstock.workers.parallel.rank_survival import LeadingRank, SurvivingRank
    from penstock.workers.runner import ModelRunner

log = logging.getLogger(__name__)

_LEAST_GRACE_S = 5.0
_SCRATCH_SHARE = 4  # of a rank's blocks, one in so many may be for prompts that all ranks compute


@dataclasses.dataclass(slots=True)
class _Opened:
    """What a rank has to the others once its groups are open."""

    store: Any = None
    ranks: ExpertRanks | None = None


def lead_computing(settings: WorkerSettings, leader: GroupLeader) -> tuple[Computing, int]:
    """Wait for the followers, load this rank, wait until all have: what computes for the group, and a bank's blocks.

    Raises ConfigError, GroupError.
    """
    leader.meet()
    opened = _Opened()

    def collectives(device: torch.device) -> tuple[Collectives, ExpertRanks | None]:
        # Late: it imports torch.
        from penstock.workers.parallel.group_collectives import lead_store, open_expert_ranks, open_tensor_group

        opened.store = lead_store(leader, settings)
        tensor = open_tensor_group(leader, settings, opened.store, device)
        opened.ranks = open_expert_ranks(leader, settings, opened.store, device)
        return tensor, opened.ranks

    own = build_computing(settings, RankGroup(_shard(settings), LeaderSums(leader), collectives))
    num_blocks = use_banks(settings, own, leader.complete(fingerprint(own.layout), own.storage.num_blocks))
    survival = lead_survival(settings, leader, own, opened)
    runner = GroupRunner(own.runner, leader, survival)
    prepare = runner.use_idle_time if survival is not None else own.prepare
    experts = shared_experts(own)

    def totals() -> GroupTotals:
        lost = len(leader.lost_ranks)
        if experts is None:
            return GroupTotals(lost)
        return GroupTotals(lost, len(experts.gone), skew(experts.rank_rows()[:, list(experts.members)]))

    return dataclasses.replace(own, runner=runner, prepare=prepare, group_totals=totals), num_blocks


def rank_transfer(settings: WorkerSettings, computing: Computing, wake: Callable[[], None]) -> TransferEngine:
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
        clock=fault_points.clock_of(settings.worker_id),
        share=layout.share,
        pieces=layout.pieces,
        tls=open_peer_tls(settings.tls),
    )


def lead_transfer(
    settings: WorkerSettings, leader: GroupLeader, own: TransferEngine, bank_blocks: int, wake: Callable[[], None]
) -> GroupTransfer:
    """The transfer of the whole group, for the engine thread that `wake` wakes."""
    ranks = GroupRanks(leader.width // attention_ranks(settings), bank_blocks)
    transfer = GroupTransfer(own, ranks, leader.sender.send)

    def lost(rank: int) -> None:
        transfer.lose(rank)
        wake()

    def heard(rank: int, over: SessionOver) -> None:
        transfer.heard(rank, over)
        wake()

    leader.on_session_over = heard
    leader.on_loss = lost
    return transfer


def build_follower(settings: WorkerSettings, follower: Follower) -> FollowerParts:
    """Load this rank and wait for the others. Raises ConfigError, ModelError, GroupError."""
    began = time.monotonic()
    opened = _Opened()

    def collectives(device: torch.device) -> tuple[Collectives, ExpertRanks | None]:
        from penstock.workers.parallel.group_collectives import follow_store, open_expert_ranks, open_tensor_group

        opened.store = follow_store(follower, settings)
        tensor = open_tensor_group(follower, settings, opened.store, device)
        opened.ranks = open_expert_ranks(follower, settings, opened.store, device)
        return tensor, opened.ranks

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
    survival = surviving_rank(settings, follower.progress, computing, opened)
    address = "" if computing.supply is None else computing.supply.address
    put = None if computing.model is None else follow_adapters(computing.model)
    return FollowerParts(computing.runner, storage.generations[:num_blocks], transfer, bank, survival, address, put)


def follow_adapters(model: ModelRunner) -> Callable[[PutUpdate], None] | None:
    """What fills this rank's room for adapters; None where it has none."""
    if model.adapters is None:
        return None
    from penstock.workers.parallel.group_adapters import put_update

    return functools.partial(put_update, model.adapters)


def surviving_rank(
    settings: WorkerSettings,
    progress: RankProgress,
    computing: Computing,
    opened: _Opened,
    alive: Callable[[int], bool] = lambda _rank: True,
    call: Callable[[int], object] = lambda _epoch: None,
) -> SurvivingRank | None:
    """This rank's part in going on when others are lost, as far as it can tell; None where the group ends by that.

    `alive` and `call` are rank 0's; see `Membership`.
    """
    ranks, model = opened.ranks, computing.model
    if ranks is None or model is None or model.states is None:
        return None
    if settings.group.tensor_parallel_size > 1 or model.device.type != "cpu":
        return None
    from penstock.workers.parallel.expert_membership import Membership
    from penstock.workers.parallel.rank_survival import SharedParts, SurvivingRank

    experts = shared_experts(computing)
    membership = Membership(opened.store, settings.group.rank, _grace_s(settings), alive, call)
    return SurvivingRank(settings.group.rank, SharedParts(model.states, experts, ranks.meet, progress), membership)


def shared_experts(computing: Computing) -> ExpertParallel | None:
    """What this rank has of a model's experts; None where each rank, or the only one, has all."""
    if computing.model is None:
        return None
    from penstock.workers.parallel.expert_parallel import ExpertParallel

    experts = computing.model.experts
    return experts if isinstance(experts, ExpertParallel) else None


def lead_survival(
    settings: WorkerSettings, leader: GroupLeader, computing: Computing, opened: _Opened
) -> LeadingRank | None:
    """The same for rank 0, which knows all of it; from now on the loss of a rank is no end."""

    def call(epoch: int) -> None:
        leader.sender.send(MeetAgain(epoch))

    own = surviving_rank(settings, leader.progress, computing, opened, leader.is_alive, call)
    if own is None or not leader.on_one_host:
        return None
    from penstock.workers.parallel.rank_survival import LeadingRank

    leader.can_lose_ranks = True
    return LeadingRank(own, leader, lambda: leader.sender.send(PumpExperts()))


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
    from penstock.workers.parallel.shared_prompts import Banks  # late: it imports torch

    needed = computing.layout.blocks_for(settings.scheduler.max_model_len)
    shares = group.context_parallel_size > 1 and group.context_parallel_threshold > 0
    banks = Banks(num_blocks)
    if shares:
        # One prompt of any length can be shared; several, as far as a step computes them and others' room allows.
        step = computing.layout.blocks_for(settings.scheduler.max_num_batched_tokens)
        scratch = max(needed, min(step, num_blocks // _SCRATCH_SHARE))
        banks = Banks(num_blocks - scratch, scratch, group.context_parallel_threshold)
    if banks.blocks < needed:
        raise ConfigError(
            f"a rank has {num_blocks} KV blocks, of which {banks.scratch} are for prompts that all ranks compute; one "
            f"sequence of max_model_len {settings.scheduler.max_model_len} needs {needed} more: give more KV memory or "
            "lower max_model_len",
            "kv.num_blocks" if settings.kv.num_blocks else "kv.memory_bytes",
        )
    model.use_banks(banks)
    return banks.blocks


def _grace_s(settings: WorkerSettings) -> float:
    """How long a rank that lives may take to come to the others: one that hangs is noticed, and ended, before."""
    return max(_LEAST_GRACE_S, 2 * settings.group.silence_s)


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
