"""How many KV blocks a device's memory holds beside the weights and the largest step.

Pure arithmetic, called by `runner.py` with what a profiled step needed. Source: Kwon et al. 2023 (PagedAttention),
section 4.2: blocks = (memory x utilization - weights - peak of activations) / bytes of a block.
"""

from __future__ import annotations

from dataclasses import dataclass

from penstock.workers.errors import ConfigError


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """Bytes on one device before there is a KV pool."""

    total: int  # of the device
    weights: int  # and all else that stays
    activations: int  # more than that at the peak of the largest step
    foreign: int  # taken by others and by the driver, no tensor of this process


def blocks_that_fit(use: MemoryUse, utilization: float, block_bytes: int, needed: int) -> int:
    """Blocks for the pool, beside one that nobody owns. Raises ConfigError where fewer than `needed` fit.

    `utilization` is the share of the whole device that this worker may take; what others hold counts only as far as
    the rest of the device cannot hold it.
    """
    allowed = int(use.total * utilization)
    unavoidable = max(0, use.foreign - (use.total - allowed))
    left = allowed - use.weights - use.activations - unavoidable
    num_blocks = left // block_bytes - 1
    if num_blocks < needed:
        raise ConfigError(
            f"{use.total >> 20} MiB of device memory at utilization {utilization:g} leave {max(0, left) >> 20} MiB for "
            f"KV beside {use.weights >> 20} MiB of weights, {use.activations >> 20} MiB of activations and "
            f"{use.foreign >> 20} MiB of others: {max(0, num_blocks)} blocks, and one sequence of max_model_len needs "
            f"{needed}; raise kv.gpu_memory_utilization, or lower max_model_len or max_num_batched_tokens",
            key="kv.gpu_memory_utilization",
        )
    return num_blocks
