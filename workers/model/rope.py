"""Cosine and sine tables of the rotary position embedding, for every position the worker may serve.

Used by `decoder.py`. Frequencies and angles are computed in float32 in the order of operations that the reference
implementations use, because an angle at position 4,000 carries their rounding and exactness is judged against it.
Sources: Su et al. 2021 (RoPE); linear scaling, Chen et al. 2023; Llama 3.1's scaling as in its reference code.
Legend: M positions, D head dim.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from penstock.workers.model.config import DecoderConfig, RopeScaling


def rope_tables(config: DecoderConfig, num_positions: int) -> tuple[Tensor, Tensor]:
    """(cos, sin), each [M, D / 2] float32."""
    frequencies = inverse_frequencies(config)
    angles = torch.arange(num_positions, dtype=torch.float32)[:, None] * frequencies
    return angles.cos(), angles.sin()


def inverse_frequencies(config: DecoderConfig) -> Tensor:
    """[D / 2] float32, radians per position."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    frequencies = 1.0 / (config.rope_theta**exponents)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    return frequencies / scaling.factor if scaling.kind == "linear" else _llama3(frequencies, scaling)


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
