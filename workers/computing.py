"""What computes in a worker or in one rank of it, with the pool it writes: the oracle, or a model on some device.

Called once by `assembly.py` and `group_assembly.py`. torch is imported only when the settings ask for a model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from penstock.workers.errors import ConfigError
from penstock.workers.kv.layout import KVLayout
from penstock.workers.kv.storage import KVStorage
from penstock.workers.oracle import OracleGroup, OracleRunner, oracle_layout
from penstock.workers.parallel.shards import WHOLE, TensorShard
from penstock.workers.scheduler.plan import Runner, StartStep
from penstock.workers.settings import WorkerSettings
from penstock.workers.totals import GroupTotals
from penstock.workers.transfer.port import BlockStorage

if TYPE_CHECKING:
    import torch

    from penstock.workers.expert_ranks import ExpertRanks
    from penstock.workers.parallel.collectives import Collectives
    from penstock.workers.runner import ModelRunner
    from penstock.workers.weights.supply import WeightSupply


@dataclass(frozen=True, slots=True)
class Computing:
    """What computes, and the pool that it writes as the others see it."""

    runner: Runner
    storage: BlockStorage
    layout: KVLayout
    prepare: Callable[[], bool] | None = None  # see EngineParts
    model: ModelRunner | None = None  # the runner, where it is a model's
    start: StartStep | None = None  # see EngineParts
    group_totals: Callable[[], GroupTotals] = GroupTotals  # of its ranks, where there are several
    supply: WeightSupply | None = None  # where its weights came from, and what serves them on


@dataclass(frozen=True, slots=True)
class RankGroup:
    """How one rank's runner works with those of the other ranks."""

    shard: TensorShard
    oracle: OracleGroup
    collectives: Callable[[torch.device], tuple[Collectives, ExpertRanks | None]]  # opened at most once, by a model


def build_computing(settings: WorkerSettings, group: RankGroup | None = None) -> Computing:
    """The runner with the storage it writes: the layout decides how large the storage is.

    `group` None: the whole worker. Raises ConfigError, ModelError, and GroupError where ranks do not meet.
    """
    if settings.runner.kind == "oracle":
        shard, sums = (WHOLE, None) if group is None else (group.shard, group.oracle)
        layout = oracle_layout(settings.runner, settings.kv, shard)
        storage = _create_storage(settings, layout)
        oracle = OracleRunner(settings.runner, layout, storage.data, shard=shard, group=sums)
        return Computing(oracle, storage, layout)
    if settings.runner.kind != "model":
        raise ConfigError(f"unknown runner {settings.runner.kind!r}; known: model, oracle", "runner.kind")
    return _build_model(settings, group)


def _build_model(settings: WorkerSettings, group: RankGroup | None) -> Computing:
    # Late: torch takes seconds to import, and half of the workers' tests run without it.
    from penstock.workers.device import resolve_device
    from penstock.workers.model_build import build_model_runner
    from penstock.workers.weights.supply import WeightSupply

    supply = WeightSupply(settings)
    told, adapters = (settings.runner, settings.kv, settings.scheduler), settings.adapters
    if group is None:
        model = build_model_runner(*told, supply=supply, adapters=adapters)
    else:
        ranks, experts = group.collectives(resolve_device(settings.runner.device))
        model = build_model_runner(*told, group=ranks, expert_ranks=experts, supply=supply, adapters=adapters)
    supply.loaded()
    if model.device.type == "cpu":
        storage = _create_storage(settings, model.layout)
        model.attach(storage)
        start = model.start if group is None and settings.scheduler.plan_ahead == "always" else None
        return Computing(model, storage, model.layout, model=model, start=start, supply=supply)
    from penstock.workers.device_pool import PoolWish, open_pool
    from penstock.workers.device_transfer import CardStorage

    needed = model.layout.blocks_for(settings.scheduler.max_model_len)
    # Ranks profile together or not at all: none may remember a start that another has forgotten.
    pool = open_pool(model, PoolWish(settings.kv, needed, settings.runner.record_dir if group is None else ""))
    idle = model.use_idle_time if group is None else None
    start = model.start if group is None and settings.scheduler.plan_ahead != "never" else None
    return Computing(model, CardStorage(pool), model.layout, idle, model, start, supply=supply)


def _create_storage(settings: WorkerSettings, layout: KVLayout) -> KVStorage:
    num_blocks = settings.kv.num_blocks or settings.kv.memory_bytes // layout.block_bytes
    needed = layout.blocks_for(settings.scheduler.max_model_len)
    if num_blocks < needed:
        raise ConfigError(
            f"the KV pool holds {num_blocks} blocks of {layout.block_bytes} bytes, and one sequence of max_model_len "
            f"{settings.scheduler.max_model_len} needs {needed}: give more KV memory or lower max_model_len",
            "kv.num_blocks" if settings.kv.num_blocks else "kv.memory_bytes",
        )
    return KVStorage.create(num_blocks, layout.block_bytes)
