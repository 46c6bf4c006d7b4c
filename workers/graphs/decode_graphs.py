"""Decode steps by replay: which step fits a recording, how it is padded, and when which bucket is recorded.

Used by `runner.py` on the engine thread; a step that does not fit is the runner's to compute eagerly, and so is every
step until its bucket has been recorded. Nothing is recorded before the first step has been served.

A recorded step reads its inputs and its attention plan from buffers that stay and leaves the hidden states in one that
stays, so a replay needs new contents only. Padded rows feed token 0 into a block that belongs to nobody. What samples
the tokens comes after the replay and is never recorded: it depends on what the requests ask for.
Source: the padding rule is that of FlashInfer's plan for captured steps: grids and pointers depend on maxima only.

Invariant: before a replay, the buffers of its bucket hold this step's inputs and plan.
Legend: N rows, E hidden size.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol

import numpy as np
from torch import Tensor

from penstock.kernels.ragged import AttentionPlan, RaggedBatch
from penstock.workers.graphs.buckets import BucketTable
from penstock.workers.graphs.store import GraphStore
from penstock.workers.graphs.traffic import BucketTraffic
from penstock.workers.scheduler.plan import SamplingBatch, StepPlan
from penstock.workers.step_inputs import StepInputs, StepTensors

logger = logging.getLogger(__name__)


class DecodeStep(Protocol):
    """What the runner lends: the model's forward pass over the KV storage, with plans in memory that stays."""

    @property
    def hidden(self) -> Tensor:
        """[largest bucket, E], where recorded steps leave their hidden states."""
        ...

    def plan(self, bucket: int, batch: RaggedBatch) -> AttentionPlan:
        """The batch's plan, made in the bucket's own memory: every plan of a bucket has the same addresses."""
        ...

    def forward(self, inputs: StepTensors, plan: AttentionPlan) -> Tensor:
        """Hidden states of the wanted tokens."""
        ...


class DecodeGraphs:
    """Recordings of `step` for the sizes of `table`."""

    def __init__(
        self,
        step: DecodeStep,
        inputs: StepInputs,
        table: BucketTable,
        store: GraphStore,
        traffic: BucketTraffic,
        *,
        scratch_block: int,
        clock: Callable[[], float],
        sync: Callable[[], None],
    ) -> None:
        """`sync` waits for the device, so that the time of a capture can be taken."""
        self._step = step
        self._inputs = inputs
        self.table = table
        self._store = store
        self._clock = clock
        self._sync = sync
        self._scratch_block = scratch_block
        self._plans: dict[int, AttentionPlan] = {}
        self._served = False
        self.traffic = traffic

    @property
    def buckets(self) -> frozenset[int]:
        """Those recorded so far."""
        return self._store.buckets

    def bucket_of(self, plan: StepPlan) -> int | None:
        """The bucket of a plan in which every row decodes and samples, and nothing else is asked; else None."""
        rows = len(plan.starts)
        if len(plan.adapters):
            return None
        if plan.num_decode != rows or len(plan.sample_rows) != rows or len(plan.embed_rows) or plan.scored is not None:
            return None
        return self.table.bucket_for(rows)

    def replay(self, plan: StepPlan, bucket: int | None) -> Tensor | None:
        """Start the step: hidden states [N, E], valid until the next replay. None where the bucket has no recording."""
        if bucket is None or bucket not in self._store.buckets:
            return None
        self._load(plan, bucket)
        self._store.replay(bucket)
        return self._step.hidden[: len(plan.starts)]

    def padded(self, plan: StepPlan, bucket: int) -> Tensor:
        """The same step, computed without a recording: hidden states [N, E]. What a replay must equal."""
        inputs = self._load(plan, bucket)
        return self._step.forward(inputs, self._plans[bucket])[: len(plan.starts)]

    def saw(self, bucket: int, seconds: float, *, replayed: bool) -> None:
        """A step of this bucket was served. Under load without a pause, a bucket that is due is recorded at once."""
        self._served = True
        self.traffic.saw(bucket, seconds, replayed=replayed)
        if not replayed and self.traffic.is_due(bucket) and self._store.may_capture(bucket):
            self.capture(bucket)

    def use_idle_time(self) -> bool:
        """Record the bucket that is worth most; False where none is, or nothing has been served yet."""
        if not self._served:
            return False
        bucket = self.traffic.hottest(size for size in self.table.sizes if self._store.may_capture(size))
        return bucket is not None and self.capture(bucket)

    def capture(self, bucket: int) -> bool:
        """Record one bucket, on padded rows alone."""
        began = self._clock()
        inputs = self._load(_NO_ROWS, bucket)
        target = self._step.hidden[:bucket]

        def work() -> None:
            target.copy_(self._step.forward(inputs, self._plans[bucket]))

        done = self._store.capture(bucket, work)
        self._sync()
        took = self._clock() - began
        if done:
            self.traffic.captured(bucket, took)
            logger.info("captured decode steps of %d rows in %.3f s", bucket, took)
        return done

    def _load(self, plan: StepPlan, bucket: int) -> StepTensors:
        inputs = self._inputs.fill(plan, bucket)
        batch = self._inputs.padded_batch(plan, bucket, self._scratch_block)
        self._plans[bucket] = self._step.plan(bucket, batch)
        return inputs


def _no_rows() -> StepPlan:
    none, real = np.zeros(0, np.int32), np.zeros(0, np.float32)
    sampling = SamplingBatch(real, none, real, real, np.zeros(0, np.uint64), none, none, none)
    return StepPlan(
        step=0,
        slots=none,
        starts=none,
        offsets=np.zeros(1, np.int32),
        token_ids=none,
        block_tables=np.zeros((0, 1), np.int32),
        sample_rows=none,
        sampling=sampling,
        num_decode=0,
    )


_NO_ROWS = _no_rows()
