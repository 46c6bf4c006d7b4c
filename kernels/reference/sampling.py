"""Sampling one row at a time with whole sorts and noise for every token: the definition.

Called through `kernels/ops.py`; knows only tensors. Legend: S rows, V vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from penstock.kernels.reference.philox import gumbel
from penstock.kernels.sampling_rules import LEAST_TEMPERATURE, mass_scale


def sample_tokens(
    logits_SV: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    choice: Tensor,
    position: Tensor,
) -> Tensor:
    """See `ops.sample_tokens`."""
    tokens = []
    for row, logits in enumerate(logits_SV):
        scaled = logits / temperature[row].to(logits.dtype)
        if not float(temperature[row]) >= LEAST_TEMPERATURE or not math.isfinite(float(scaled.max())):
            tokens.append(_first_largest(logits))
            continue
        kept = _kept(scaled, int(top_k[row]), float(top_p[row]), min_p[row])
        names = torch.arange(len(logits))
        seeds, choices, positions = (torch.full_like(names, int(column[row])) for column in (seed, choice, position))
        score = scaled.double().cpu() + gumbel(seeds, choices, positions, names)
        tokens.append(_first_largest(score.masked_fill(~kept.cpu(), -math.inf)))
    return torch.tensor(tokens, dtype=torch.int64, device=logits_SV.device)


def _first_largest(values: Tensor) -> int:
    """The lowest index of the largest value, where NaN is larger than all."""
    found = torch.isnan(values) | (values == values.max())
    return int(torch.nonzero(torch.isnan(values) if bool(torch.isnan(values).any()) else found)[0])


def _kept(scaled: Tensor, top_k: int, top_p: float, min_p: Tensor) -> Tensor:
    """[V] bool."""
    top = scaled.max()
    floor = min(float(top), float(top + min_p.double().log().to(scaled.dtype))) if float(min_p) > 0 else -math.inf
    kept = scaled >= floor
    if 0 < top_k < len(scaled):
        kept &= scaled >= scaled.sort(descending=True).values[top_k - 1]
    if top_p < 1:
        mass = (((scaled.double() - top.double()).exp() * mass_scale(len(scaled)) + 0.5).long()) * kept
        values, place = torch.unique(scaled, return_inverse=True)
        each = torch.zeros(len(values), dtype=torch.int64, device=scaled.device).index_add_(0, place, mass)
        larger = each.flip(0).cumsum(0).flip(0) - each
        inside = larger.double() < top_p * each.sum().double()
        kept &= inside[place] | (scaled == top)
    return kept
