"""What the largest step takes of a device's memory, found by running it once before there is a KV pool.

Called by `runner.py` at start on a GPU; `kv/sizing.py` turns the answer into a number of blocks. It knows plans, not
models. Source: Kwon et al. 2023 (PagedAttention), section 4.2, and vLLM's profile run.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from penstock.workers.device import DeviceMemory
from penstock.workers.kv.sizing import MemoryUse
from penstock.workers.scheduler.plan import SamplingBatch, StepPlan
from penstock.workers.step_inputs import StepLimits


def largest_plan(limits: StepLimits, block_size: int) -> StepPlan:
    """A step that fills the limits: as many rows as there may be, all tokens, every row samples with every filter."""
    rows = min(limits.max_rows, limits.max_tokens)
    longest = limits.table_width * block_size
    counts = np.full(rows, 1, np.int32)
    left = limits.max_tokens - rows
    for row in range(rows):
        if left <= 0:
            break
        more = min(left, longest - 1)
        counts[row] += more
        left -= more
    counts = counts[::-1]  # as in a real step, decodes come first
    offsets = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
    blocks = -(-counts // block_size)
    firsts = np.cumsum(blocks) - blocks
    tables = np.zeros((rows, int(blocks.max())), np.int32)
    for row in range(rows):
        tables[row, : blocks[row]] = np.arange(firsts[row], firsts[row] + blocks[row])
    return StepPlan(
        step=0,
        slots=np.arange(rows, dtype=np.int32),
        starts=np.zeros(rows, np.int32),
        offsets=offsets,
        token_ids=np.zeros(int(offsets[-1]), np.int32),
        block_tables=tables,
        sample_rows=np.arange(rows, dtype=np.int32),
        sampling=_sampling(rows),
        num_decode=0,
    )


def blocks_of(plan: StepPlan, block_size: int) -> int:
    """How many blocks the plan's tables name."""
    return int((-(-np.diff(plan.offsets) // block_size)).sum())


def measure(run: Callable[[], object], memory: DeviceMemory, scaffold_bytes: int) -> MemoryUse:
    """Run the step and count; `scaffold_bytes` of what it leaves and takes is KV that only it needs."""
    run()  # what is compiled, loaded or cached at first use is no part of a step
    memory.reset_peak()
    weights = memory.allocated - scaffold_bytes
    run()
    activations = max(0, memory.peak - memory.allocated)
    memory.reset_peak()
    foreign = max(0, memory.total - memory.free - memory.allocated)
    return MemoryUse(memory.total, weights, activations, foreign)


def _sampling(rows: int) -> SamplingBatch:
    return SamplingBatch(
        temperature=np.ones(rows, np.float32),
        top_k=np.full(rows, 50, np.int32),
        top_p=np.full(rows, 0.9, np.float32),
        min_p=np.full(rows, 0.01, np.float32),
        seed=np.arange(rows, dtype=np.uint64),
        choice=np.zeros(rows, np.int32),
        position=np.ones(rows, np.int32),
        logprobs=np.full(rows, -1, np.int32),
    )
