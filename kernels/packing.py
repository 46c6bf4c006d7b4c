"""Weights and step plans as the backend that will multiply with them wants them; plain data, made by one backend.

Made at load by `ops.pack_weight`, `ops.quantize_weight` and `ops.pack_experts`, and once per step by `ops.plan_lora`;
read by the operations that take them. Only the backend that made a `PackedWeight` or a `PackedExperts` may read its
tensors; a `QuantizedWeight` has one layout for all.
Legend: T tokens, K inputs, M outputs, G = K / 128 groups, E experts, F width of one expert, S adapter slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from torch import Tensor

GROUP = 128  # inputs that share one scale in the grouped and blocked formats
BLOCK = 128  # outputs that share one scale in the blocked format


@dataclass(frozen=True, slots=True, eq=False)
class PackedWeight:
    """`weight` is [M, K], or an opaque tensor in the backend's own order when `rearranged`."""

    weight: Tensor
    bias: Tensor | None
    num_outputs: int
    num_inputs: int
    rearranged: bool


class QuantFormat(StrEnum):
    """How a weight's codes are made; the activations' are named with it."""

    FP8_TENSOR = "fp8_tensor"  # e4m3, one scale; activations one scale per token, or one fixed scale
    FP8_CHANNEL = "fp8_channel"  # e4m3, one scale per output; activations one per token, or one fixed
    FP8_BLOCK = "fp8_block"  # e4m3, one scale per 128 x 128; activations one per token and 128 inputs
    INT8_CHANNEL = "int8_channel"  # symmetric, one scale per output; activations one per token
    INT4_GROUP = "int4_group"  # symmetric, one scale per output and 128 inputs; activations as they are


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedWeight:
    """A weight as codes and scales.

    `codes` and `scales` by format, with K and M as they are (the last block may be short):
        fp8_tensor    float8_e4m3fn [M, K]   float32 [1]
        fp8_channel   float8_e4m3fn [M, K]   float32 [M]
        fp8_block     float8_e4m3fn [M, K]   float32 [ceil(M / 128), ceil(K / 128)]
        int8_channel  int8 [M, K]            float32 [M]
        int4_group    int32 [G, M, 16]       bfloat16 (float32 for a float32 weight) [G, M]
    In int4_group, bits 4 j .. 4 j + 3 of word [g, m, i] hold code + 8 of input 128 g + 16 j + i: shifting a tile of
    words right by 4 j for j = 0 .. 7 and laying the results side by side gives 128 inputs in their order, and a lane
    that holds words 2 c, 2 c + 1, 2 c + 8 and 2 c + 9 owns just the elements that a 16-wide matrix instruction
    wants from it.
    `input_scale` is the fixed scale of the activations, float32 [1], or None where each token has its own.
    """

    format: QuantFormat
    codes: Tensor
    scales: Tensor
    bias: Tensor | None
    num_outputs: int
    num_inputs: int
    input_scale: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class PackedExperts:
    """The feed-forward weights of E experts: `gate_up` [E, 2 F, K] and `down` [E, K, F], or `per_expert` instead."""

    num_experts: int
    width: int
    num_inputs: int
    gate_up: Tensor | None
    down: Tensor | None
    per_expert: tuple[tuple[PackedWeight, PackedWeight], ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class LoraPlan:
    """Which tokens use which adapter: `order[start:end]` are those of segment (slot, start, end), in their order.

    `order` is int64 [n] on the device of the tokens, n of them with an adapter. Backends add what they need.
    """

    num_tokens: int
    num_slots: int  # 1 + the largest slot used
    order: Tensor
    segments: tuple[tuple[int, int, int], ...]
