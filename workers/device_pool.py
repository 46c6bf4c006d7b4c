"""The KV pool of a worker on a GPU: as many blocks as fit, found by a profiled step or taken from the last start.

Called by the worker's assembly between loading the model and serving. Also the one who writes the start-up record,
since the number of blocks is half of it. It does not know the scheduler or requests.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from penstock.workers.device import CudaMemory, DeviceMemory, device_facts
from penstock.workers.errors import ConfigError
from penstock.workers.graphs.record import RecordKey, StartRecord, read_record, write_record
from penstock.workers.graphs.traffic import BucketFigures
from penstock.workers.kv.device_storage import DeviceKVStorage
from penstock.workers.kv.sizing import blocks_that_fit
from penstock.workers.memory_profile import blocks_of, largest_plan, measure
from penstock.workers.runner import ModelRunner
from penstock.workers.settings import KVSettings

logger = logging.getLogger(__name__)

_KEEP_EVERY_S = 30.0


@dataclass(frozen=True, slots=True)
class PoolSize:
    """The pool, and what has to stay free beside it."""

    num_blocks: int
    step_bytes: int


class RecordKeeper:
    """The `StartKeeper` of one worker; writes at most every 30 s, and only what changed."""

    def __init__(
        self, folder: str, key: RecordKey, size: PoolSize, known: StartRecord | None, clock: Callable[[], float]
    ) -> None:
        """`folder` empty: nothing is kept."""
        self._folder = folder
        self._key = key
        self._size = size
        self._clock = clock
        self._kept_at: float | None = None
        self._kept_steps = -1.0
        self.figures: dict[int, BucketFigures] = dict(known.traffic) if known is not None else {}

    def keep(self, figures: dict[int, BucketFigures]) -> None:
        """See `StartKeeper.keep`."""
        now, steps = self._clock(), sum(each.steps for each in figures.values())
        if not self._folder or steps == self._kept_steps:
            return
        if self._kept_at is not None and now - self._kept_at < _KEEP_EVERY_S:
            return
        self._kept_at, self._kept_steps = now, steps
        record = StartRecord(self._key, self._size.num_blocks, self._size.step_bytes, figures)
        write_record(Path(self._folder), record)


@dataclass(frozen=True, slots=True)
class PoolWish:
    """What the settings say about the pool."""

    kv: KVSettings
    needed: int  # blocks of the longest sequence
    record_dir: str


def open_pool(runner: ModelRunner, wish: PoolWish, memory: DeviceMemory | None = None) -> DeviceKVStorage:
    """Create the storage on the runner's device and attach it. Raises ConfigError where too few blocks fit."""
    memory = memory or CudaMemory(runner.device)
    key = record_key(runner, wish.kv)
    known = read_record(Path(wish.record_dir), key) if wish.record_dir else None
    if wish.kv.num_blocks:
        size = PoolSize(wish.kv.num_blocks, 0)
    else:
        size = _remembered(known, runner, wish, memory) or profile(runner, wish, memory)
    keeper = RecordKeeper(wish.record_dir, key, size, known, time.monotonic)
    storage = DeviceKVStorage.create(size.num_blocks, runner.layout.block_bytes, runner.device)
    runner.attach(storage, keeper)
    mebibytes = storage.num_blocks * storage.block_bytes >> 20
    logger.info("KV pool on %s: %d blocks, %d MiB", runner.device, storage.num_blocks, mebibytes)
    return storage


def record_key(runner: ModelRunner, kv: KVSettings) -> RecordKey:
    """What the record of this runner depends on."""
    facts, limits = device_facts(runner.device), runner.limits
    return RecordKey(
        model=hashlib.sha256(runner.layout.compatibility.encode()).hexdigest()[:16],
        device=facts.name,
        driver=facts.driver,
        libraries=facts.libraries,
        layout_id=runner.memory.layout_id,
        utilization=kv.gpu_memory_utilization,
        limits=(limits.max_rows, limits.max_tokens, limits.table_width),
    )


def profile(runner: ModelRunner, wish: PoolWish, memory: DeviceMemory) -> PoolSize:
    """Blocks that fit beside the largest step. Raises ConfigError where the step or one sequence does not fit."""
    plan, size = largest_plan(runner.limits, runner.layout.block_size), runner.layout.block_bytes
    num_blocks = blocks_of(plan, runner.layout.block_size) + 1
    try:
        scaffold = torch.zeros((num_blocks, size), dtype=torch.uint8, device=runner.device)
        runner.attach(_Scaffold(scaffold))
        use = measure(lambda: runner.run(plan), memory, scaffold.nbytes)
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"a step of {runner.limits.max_tokens} tokens does not fit into the memory of {runner.device} beside the "
            "weights; lower max_num_batched_tokens or max_num_seqs",
            key="scheduler.max_num_batched_tokens",
        ) from error
    finally:
        runner.detach()
    # Recorded steps keep temporaries of their own, for as many tokens as they have rows.
    use = dataclasses.replace(use, activations=use.activations + runner.recorded_share(use.activations))
    return PoolSize(blocks_that_fit(use, wish.kv.gpu_memory_utilization, size, wish.needed), use.activations)


@dataclass(frozen=True, slots=True, eq=False)
class _Scaffold:
    """A `DeviceStorage` for the profiled step only."""

    tensor: torch.Tensor


def _remembered(
    known: StartRecord | None, runner: ModelRunner, wish: PoolWish, memory: DeviceMemory
) -> PoolSize | None:
    """The last start's size where it still fits into what is free now."""
    if known is None or not known.step_bytes or known.num_blocks < wish.needed:
        return None
    if (known.num_blocks + 1) * runner.layout.block_bytes + known.step_bytes > memory.free:
        logger.info("the last start's %d KV blocks do not fit now; profiling", known.num_blocks)
        return None
    return PoolSize(known.num_blocks, known.step_bytes)
