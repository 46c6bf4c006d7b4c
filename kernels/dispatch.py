"""Which implementation of the operations serves a device and dtype; asked by `kernels/ops.py` on every call.

CPU tensors of float32 and bfloat16 get `kernels/native` (C++) where it can be compiled, the other usual dtypes
`kernels/cpu` (torch), tensors of a GPU `kernels/gpu` (Triton), everything else `kernels/reference`. The environment
variable PENSTOCK_KERNELS (`auto`, `reference`, `cpu`, `native`, `gpu`) overrides it for the whole process. Each choice
is logged once. PENSTOCK_KERNELS_CHECKED=1 turns on the checks of values.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from penstock.kernels.composed import RotateAndStore, rotate_and_store_of
from penstock.kernels.cpu import activation as cpu_activation
from penstock.kernels.cpu import attention as cpu_attention
from penstock.kernels.cpu import attention_states as cpu_attention_states
from penstock.kernels.cpu import kv_blocks as cpu_kv_blocks
from penstock.kernels.cpu import latent_attention as cpu_latent_attention
from penstock.kernels.cpu import linear as cpu_linear
from penstock.kernels.cpu import lora as cpu_lora
from penstock.kernels.cpu import moe as cpu_moe
from penstock.kernels.cpu import norm as cpu_norm
from penstock.kernels.cpu import philox as cpu_philox
from penstock.kernels.cpu import quantized_linear as cpu_quantized_linear
from penstock.kernels.cpu import rotary as cpu_rotary
from penstock.kernels.cpu import sampling as cpu_sampling
from penstock.kernels.native import attention as native_attention
from penstock.kernels.native import elementwise as native_elementwise
from penstock.kernels.native import kv_blocks as native_kv_blocks
from penstock.kernels.native import latent_attention as native_latent_attention
from penstock.kernels.native import library as native_library
from penstock.kernels.native import linear as native_linear
from penstock.kernels.native import lora as native_lora
from penstock.kernels.native import moe as native_moe
from penstock.kernels.packing import LoraPlan, PackedExperts, PackedWeight, QuantFormat, QuantizedWeight
from penstock.kernels.ragged import AttentionLimits, AttentionPlan, AttentionWorkspace
from penstock.kernels.reference import activation as reference_activation
from penstock.kernels.reference import attention as reference_attention
from penstock.kernels.reference import kv_blocks as reference_kv_blocks
from penstock.kernels.reference import latent_attention as reference_latent_attention
from penstock.kernels.reference import linear as reference_linear
from penstock.kernels.reference import lora as reference_lora
from penstock.kernels.reference import moe as reference_moe
from penstock.kernels.reference import norm as reference_norm
from penstock.kernels.reference import philox as reference_philox
from penstock.kernels.reference import quantized_linear as reference_quantized_linear
from penstock.kernels.reference import rotary as reference_rotary
from penstock.kernels.reference import sampling as reference_sampling

logger = logging.getLogger(__name__)

_NATIVE_DTYPES = (torch.float32, torch.bfloat16)
_FAST_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int8, torch.float8_e4m3fn)


class Rotary(Protocol):
    """The signature of `ops.rotary`."""

    def __call__(self, x_THD: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
        """See `ops.rotary`."""
        ...


class RouteExperts(Protocol):
    """The signature of `ops.route_experts`."""

    def __call__(
        self,
        logits_TE: Tensor,
        top_k: int,
        *,
        scoring: str = "softmax",
        renormalize: bool = True,
        selection_bias: Tensor | None = None,
        groups: int = 0,
        top_groups: int = 0,
        scaling: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """See `ops.route_experts`."""
        ...


@dataclass(frozen=True, slots=True)
class Backend:
    """One implementation of every operation; each field has the signature of its namesake in `ops.py`."""

    name: str
    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    add_rms_norm: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
    rotary: Rotary
    silu_and_mul: Callable[[Tensor], Tensor]
    gelu_and_mul: Callable[[Tensor], Tensor]
    gelu_erf_and_mul: Callable[[Tensor], Tensor]
    pack_weight: Callable[[Tensor, Tensor | None], PackedWeight]
    linear: Callable[[Tensor, PackedWeight], Tensor]
    quantize_weight: Callable[[Tensor, QuantFormat, Tensor | None, float | None], QuantizedWeight]
    quantized_linear: Callable[[Tensor, QuantizedWeight], Tensor]
    route_experts: RouteExperts
    pack_experts: Callable[[Tensor, Tensor], PackedExperts]
    fused_moe: Callable[[Tensor, PackedExperts, Tensor, Tensor, str], Tensor]
    plan_lora: Callable[[Tensor, torch.device | None, bool], LoraPlan]
    lora_add: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, LoraPlan], None]
    # With the arguments of their namesakes; those after the plan, and the workspace, only where a caller gives them.
    write_kv: Callable[..., None]
    copy_blocks: Callable[[Tensor, Tensor], None]
    gather_blocks: Callable[[Tensor, Tensor, Tensor, int], None]
    scatter_blocks: Callable[[Tensor, Tensor, Tensor, int], None]
    attention_workspace: Callable[[Tensor, AttentionLimits], AttentionWorkspace]
    plan_attention: Callable[..., AttentionPlan]
    rotate_and_store: RotateAndStore
    paged_attention: Callable[..., Tensor]
    paged_attention_with_lse: Callable[..., tuple[Tensor, Tensor]]
    latent_attention: Callable[[Tensor, Tensor, int, AttentionPlan, float, int], Tensor]
    merge_states: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    philox: Callable[[Tensor, Tensor], Tensor]
    gumbel: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    sample_tokens: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


REFERENCE = Backend(
    name="reference",
    rms_norm=reference_norm.rms_norm,
    add_rms_norm=reference_norm.add_rms_norm,
    rotary=reference_rotary.rotary,
    silu_and_mul=reference_activation.silu_and_mul,
    gelu_and_mul=reference_activation.gelu_and_mul,
    gelu_erf_and_mul=reference_activation.gelu_erf_and_mul,
    pack_weight=reference_linear.pack_weight,
    linear=reference_linear.linear,
    quantize_weight=reference_quantized_linear.quantize_weight,
    quantized_linear=reference_quantized_linear.quantized_linear,
    route_experts=reference_moe.route_experts,
    pack_experts=reference_moe.pack_experts,
    fused_moe=reference_moe.fused_moe,
    plan_lora=reference_lora.plan_lora,
    lora_add=reference_lora.lora_add,
    write_kv=reference_kv_blocks.write_kv,
    copy_blocks=reference_kv_blocks.copy_blocks,
    gather_blocks=reference_kv_blocks.gather_blocks,
    scatter_blocks=reference_kv_blocks.scatter_blocks,
    attention_workspace=reference_attention.attention_workspace,
    plan_attention=reference_attention.plan_attention,
    rotate_and_store=rotate_and_store_of(
        reference_norm.rms_norm, reference_rotary.rotary, reference_kv_blocks.write_kv
    ),
    paged_attention=reference_attention.paged_attention,
    paged_attention_with_lse=reference_attention.paged_attention_with_lse,
    latent_attention=reference_latent_attention.latent_attention,
    merge_states=reference_attention.merge_states,
    philox=reference_philox.philox,
    gumbel=reference_philox.gumbel,
    sample_tokens=reference_sampling.sample_tokens,
)

CPU = Backend(
    name="cpu",
    rms_norm=cpu_norm.rms_norm,
    add_rms_norm=cpu_norm.add_rms_norm,
    rotary=cpu_rotary.rotary,
    silu_and_mul=cpu_activation.silu_and_mul,
    gelu_and_mul=cpu_activation.gelu_and_mul,
    gelu_erf_and_mul=cpu_activation.gelu_erf_and_mul,
    pack_weight=cpu_linear.pack_weight,
    linear=cpu_linear.linear,
    quantize_weight=cpu_quantized_linear.quantize_weight,
    quantized_linear=cpu_quantized_linear.quantized_linear,
    route_experts=reference_moe.route_experts,  # vectorised already, and a router's logits are few
    pack_experts=cpu_moe.pack_experts,
    fused_moe=cpu_moe.fused_moe,
    plan_lora=cpu_lora.plan_lora,
    lora_add=cpu_lora.lora_add,
    write_kv=cpu_kv_blocks.write_kv,
    copy_blocks=cpu_kv_blocks.copy_blocks,
    gather_blocks=cpu_kv_blocks.gather_blocks,
    scatter_blocks=cpu_kv_blocks.scatter_blocks,
    attention_workspace=cpu_attention.attention_workspace,
    plan_attention=cpu_attention.plan_attention,
    rotate_and_store=rotate_and_store_of(cpu_norm.rms_norm, cpu_rotary.rotary, cpu_kv_blocks.write_kv),
    paged_attention=cpu_attention.paged_attention,
    paged_attention_with_lse=cpu_attention_states.paged_attention_with_lse,
    latent_attention=cpu_latent_attention.latent_attention,
    merge_states=cpu_attention_states.merge_states,
    philox=cpu_philox.philox,
    gumbel=cpu_philox.gumbel,
    sample_tokens=cpu_sampling.sample_tokens,
)

NATIVE = dataclasses.replace(
    CPU,
    name="native",
    rms_norm=native_elementwise.rms_norm,
    add_rms_norm=native_elementwise.add_rms_norm,
    silu_and_mul=native_elementwise.silu_and_mul,
    gelu_and_mul=native_elementwise.gelu_and_mul,
    pack_weight=native_linear.pack_weight,
    linear=native_linear.linear,
    pack_experts=native_moe.pack_experts,
    fused_moe=native_moe.fused_moe,
    lora_add=native_lora.lora_add,
    write_kv=native_kv_blocks.write_kv,
    plan_attention=native_attention.plan_attention,
    rotate_and_store=native_elementwise.rotate_and_store,
    paged_attention=native_attention.paged_attention,
    paged_attention_with_lse=native_attention.paged_attention_with_lse,
    latent_attention=native_latent_attention.latent_attention,
)

_NAMES = ("auto", "reference", "cpu", "native", "gpu")


def backend_for(tensor: Tensor) -> Backend:
    """The implementation that serves tensors like this one."""
    return choose(tensor.device.type, tensor.dtype)


@functools.lru_cache(maxsize=64)
def choose(device: str, dtype: torch.dtype) -> Backend:
    """Pick by device and dtype. Raises ValueError when PENSTOCK_KERNELS names no backend."""
    told = os.environ.get("PENSTOCK_KERNELS", "auto")
    if told not in _NAMES:
        raise ValueError(f"PENSTOCK_KERNELS={told!r}: expected one of {', '.join(_NAMES)}")
    chosen = _fitting(told, device, dtype)
    logger.info("kernels for %s %s: %s%s", device, dtype, chosen.name, "" if told == "auto" else " (PENSTOCK_KERNELS)")
    return chosen


@functools.cache
def checked() -> bool:
    """Whether operations also check values, which makes a GPU wait: PENSTOCK_KERNELS_CHECKED=1."""
    return os.environ.get("PENSTOCK_KERNELS_CHECKED", "0") not in ("", "0")


def _fitting(told: str, device: str, dtype: torch.dtype) -> Backend:
    if told == "reference":
        return REFERENCE
    if told == "gpu" or (told == "auto" and device != "cpu"):
        return _gpu() or REFERENCE
    if device != "cpu" or dtype not in _FAST_DTYPES:
        return REFERENCE
    if told == "cpu" or dtype not in _NATIVE_DTYPES or native_library.load() is None:
        return CPU
    return NATIVE


def _gpu() -> Backend | None:
    """The Triton kernels, or None, said once, where Triton is missing: it comes with torch's GPU builds."""
    try:
        from penstock.kernels.gpu.backend import GPU
    except ImportError as error:
        logger.warning("Triton is not there (%s): the reference kernels serve, slowly", error)
        return None
    return GPU
