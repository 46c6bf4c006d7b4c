"""Cosine and sine tables of the rotary position embedding, for every position the worker may serve.

Used by `loading.py`. Frequencies and angles are computed in float32 in the order of operations that the reference
implementations use, because an angle at position 4,000 carries their rounding and exactness is judged against it.
Sources: Su et al. 2021 (RoPE); linear scaling, Chen et al. 2023; Llama 3.1's scaling as in its reference code; YaRN,
Peng et al. 2023.
Legend: M positions, D head dim.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from penstock.workers.model.rope_fields import Rope, RopeScaling


def rope_tables(rope: Rope, head_dim: int, num_positions: int) -> tuple[Tensor, Tensor]:
    """(cos, sin), each [M, D / 2] float32, times the attention factor where the scaling has one."""
    frequencies = inverse_frequencies(rope, head_dim)
    angles = torch.arange(num_positions, dtype=torch.float32)[:, None] * frequencies
    cos, sin = angles.cos(), angles.sin()
    if rope.scaling is not None and rope.scaling.kind == "yarn":
        factor = _attention_factor(rope.scaling)
        return cos * factor, sin * factor
    return cos, sin


def inverse_frequencies(rope: Rope, head_dim: int) -> Tensor:
    """[D / 2] float32, radians per position."""
    powers = rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    scaling = rope.scaling
    if scaling is None:
        return 1.0 / powers
    if scaling.kind == "linear":
        return 1.0 / powers / scaling.factor
    if scaling.kind == "yarn":
        return _yarn(powers, scaling, rope.theta)
    return _llama3(1.0 / powers, scaling)


def _llama3(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Long waves are stretched by the factor, short ones kept, those between interpolated."""
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    wavelengths = 2 * math.pi / frequencies
    stretched = frequencies / scaling.factor
    share = (scaling.original_positions / wavelengths - low) / (high - low)
    between = (1 - share) * stretched + share * frequencies
    result = torch.where(wavelengths > scaling.original_positions / low, stretched, frequencies)
    middle = (wavelengths <= scaling.original_positions / low) & (wavelengths >= scaling.original_positions / high)
    return torch.where(middle, between, result)


def _yarn(powers: Tensor, scaling: RopeScaling, theta: float) -> Tensor:
    """Section 3.2: dimensions that rotate often are kept, slow ones stretched, and a ramp lies between."""
    dim, low, high = 2 * len(powers), *_ramp_ends(scaling, theta, 2 * len(powers))
    ramp = torch.clamp((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low), 0, 1)
    kept = 1 - ramp
    return 1.0 / (scaling.factor * powers) * (1 - kept) + 1.0 / powers * kept


def _ramp_ends(scaling: RopeScaling, theta: float, dim: int) -> tuple[float, float]:
    """The dimensions that rotate `beta_fast` and `beta_slow` times over the original positions."""

    def dimension(rotations: float) -> float:
        wavelengths = scaling.original_positions / (rotations * 2 * math.pi)
        return dim * math.log(wavelengths) / (2 * math.log(theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    return (low, high + 0.001) if low == high else (low, high)


def _attention_factor(scaling: RopeScaling) -> float:
    """Section 3.4, or what the checkpoint says instead."""

    def temperature(mscale: float) -> float:
        return 1.0 if scaling.factor <= 1 else 0.1 * mscale * math.log(scaling.factor) + 1.0

    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return temperature(scaling.mscale) / temperature(scaling.mscale_all_dim)
    return temperature(1.0)
