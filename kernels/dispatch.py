"""Which implementation of the operations serves a device and dtype; asked by `kernels/ops.py` on every call.

CPU tensors of the usual dtypes get `kernels/cpu`, everything else `kernels/reference`. The environment variable
PENSTOCK_KERNELS (`auto`, `cpu`, `reference`) overrides it for the whole process. Each choice is logged once.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from penstock.kernels.cpu import activation as cpu_activation
from penstock.kernels.cpu import attention as cpu_attention
from penstock.kernels.cpu import kv_blocks as cpu_kv_blocks
from penstock.kernels.cpu import linear as cpu_linear
from penstock.kernels.cpu import norm as cpu_norm
from penstock.kernels.cpu import philox as cpu_philox
from penstock.kernels.cpu import rotary as cpu_rotary
from penstock.kernels.packing import PackedWeight
from penstock.kernels.ragged import AttentionPlan, RaggedBatch
from penstock.kernels.reference import activation as reference_activation
from penstock.kernels.reference import attention as reference_attention
from penstock.kernels.reference import kv_blocks as reference_kv_blocks
from penstock.kernels.reference import linear as reference_linear
from penstock.kernels.reference import norm as reference_norm
from penstock.kernels.reference import philox as reference_philox
from penstock.kernels.reference import rotary as reference_rotary

logger = logging.getLogger(__name__)

_FAST_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64)


class PagedAttention(Protocol):
    """The signature of `ops.paged_attention`."""

    def __call__(
        self,
        q_THD: Tensor,
        kv_BLCHPD: Tensor,
        layer: int,
        plan: AttentionPlan,
        scale: float,
        *,
        window: int = 0,
        soft_cap: float = 0.0,
    ) -> Tensor:
        """See `ops.paged_attention`."""
        ...


@dataclass(frozen=True, slots=True)
class Backend:
    """One implementation of every operation; each field has the signature of its namesake in `ops.py`."""

    name: str
    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    add_rms_norm: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
    rotary: Callable[[Tensor, Tensor, Tensor], Tensor]
    silu_and_mul: Callable[[Tensor], Tensor]
    gelu_and_mul: Callable[[Tensor], Tensor]
    pack_weight: Callable[[Tensor, Tensor | None], PackedWeight]
    linear: Callable[[Tensor, PackedWeight], Tensor]
    write_kv: Callable[[Tensor, int, Tensor, AttentionPlan], None]
    copy_blocks: Callable[[Tensor, Tensor], None]
    plan_attention: Callable[[Tensor, RaggedBatch], AttentionPlan]
    paged_attention: PagedAttention
    philox: Callable[[Tensor, Tensor], Tensor]
    gumbel: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


REFERENCE = Backend(
    name="reference",
    rms_norm=reference_norm.rms_norm,
    add_rms_norm=reference_norm.add_rms_norm,
    rotary=reference_rotary.rotary,
    silu_and_mul=reference_activation.silu_and_mul,
    gelu_and_mul=reference_activation.gelu_and_mul,
    pack_weight=reference_linear.pack_weight,
    linear=reference_linear.linear,
    write_kv=reference_kv_blocks.write_kv,
    copy_blocks=reference_kv_blocks.copy_blocks,
    plan_attention=reference_attention.plan_attention,
    paged_attention=reference_attention.paged_attention,
    philox=reference_philox.philox,
    gumbel=reference_philox.gumbel,
)

CPU = Backend(
    name="cpu",
    rms_norm=cpu_norm.rms_norm,
    add_rms_norm=cpu_norm.add_rms_norm,
    rotary=cpu_rotary.rotary,
    silu_and_mul=cpu_activation.silu_and_mul,
    gelu_and_mul=cpu_activation.gelu_and_mul,
    pack_weight=cpu_linear.pack_weight,
    linear=cpu_linear.linear,
    write_kv=cpu_kv_blocks.write_kv,
    copy_blocks=cpu_kv_blocks.copy_blocks,
    plan_attention=cpu_attention.plan_attention,
    paged_attention=cpu_attention.paged_attention,
    philox=cpu_philox.philox,
    gumbel=cpu_philox.gumbel,
)

_BY_NAME = {backend.name: backend for backend in (REFERENCE, CPU)}


def backend_for(tensor: Tensor) -> Backend:
    """The implementation that serves tensors like this one."""
    return choose(tensor.device.type, tensor.dtype)


@functools.lru_cache(maxsize=64)
def choose(device: str, dtype: torch.dtype) -> Backend:
    """Pick by device and dtype. Raises ValueError when PENSTOCK_KERNELS names no backend."""
    told = os.environ.get("PENSTOCK_KERNELS", "auto")
    if told != "auto" and told not in _BY_NAME:
        raise ValueError(f"PENSTOCK_KERNELS={told!r}: expected auto, {', '.join(_BY_NAME)}")
    fitting = CPU if device == "cpu" and dtype in _FAST_DTYPES else REFERENCE
    chosen = _BY_NAME.get(told, fitting)
    logger.info("kernels for %s %s: %s%s", device, dtype, chosen.name, "" if told == "auto" else " (PENSTOCK_KERNELS)")
    return chosen
