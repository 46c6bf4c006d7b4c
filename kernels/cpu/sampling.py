"""Sampling in torch: thresholds from a short prefix of the sorted row, noise only where it can matter.

Called through `kernels/ops.py`; knows only tensors. 32-bit noise is at most LARGEST_GUMBEL, so a token further than
that below what the best token reached cannot win, and leaving its noise out is exact.
Legend: S rows, R rows that are sampled with noise, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from penstock.kernels.cpu.philox import gumbel
from penstock.kernels.sampling_rules import LARGEST_GUMBEL, LEAST_TEMPERATURE, mass_scale

# How many of the largest logits are sorted before a whole row is.
_PREFIX = 256
# Rows are drawn in pieces of about this many logits, which bounds the memory a step takes.
_PIECE_ELEMENTS = 4 << 20


@dataclass(frozen=True, slots=True, eq=False)
class _Drawn:
    """The parameters of R rows; each [R]."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    seed: Tensor
    choice: Tensor
    position: Tensor

    def of(self, rows: Tensor) -> _Drawn:
        """Those of some rows."""
        return _Drawn(
            self.temperature[rows],
            self.top_k[rows],
            self.top_p[rows],
            self.min_p[rows],
            self.seed[rows],
            self.choice[rows],
            self.position[rows],
        )

    def noise(self, row: Tensor, token: Tensor) -> Tensor:
        """Gumbel noise [n] float64 of tokens [n] of rows [n]."""
        return gumbel(self.seed[row], self.choice[row], self.position[row], token)


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
    every = _Drawn(temperature, top_k, top_p, min_p, seed, choice, position)
    tokens = logits_SV.argmax(dim=-1)
    rows = torch.nonzero(temperature >= LEAST_TEMPERATURE)[:, 0]
    step = max(1, _PIECE_ELEMENTS // logits_SV.shape[1])
    for piece in torch.split(rows, step) if len(rows) else ():
        scaled = logits_SV[piece] / temperature[piece, None]
        top, top_token = scaled.max(dim=-1)
        usual = torch.isfinite(top)
        if not bool(usual.all()):  # such a row keeps its largest logit, as a greedy one does
            piece, scaled, top, top_token = piece[usual], scaled[usual], top[usual], top_token[usual]
        tokens[piece] = _draw(scaled, top, top_token, every.of(piece))
    return tokens


def _draw(scaled: Tensor, top: Tensor, top_token: Tensor, drawn: _Drawn) -> Tensor:
    """Sampled tokens [R] of scaled logits [R, V]."""
    reached = top.double() + drawn.noise(torch.arange(len(top)), top_token)
    floor = _floor(scaled, top, drawn)
    # Rounded down to float32, so that no token on the bound is lost to the comparison.
    bound = torch.nextafter((reached - LARGEST_GUMBEL).float(), torch.full_like(top, -torch.inf))
    row, token = torch.nonzero(scaled >= torch.maximum(floor, bound)[:, None], as_tuple=True)
    scores = torch.full(scaled.shape, -torch.inf, dtype=torch.float64)
    scores[row, token] = scaled[row, token].double() + drawn.noise(row, token)
    return scores.argmax(dim=-1)


def _floor(scaled: Tensor, top: Tensor, drawn: _Drawn) -> Tensor:
    """The least value [R] that a token may have: min-p, then top-k, then top-p of what those leave."""
    vocab = scaled.shape[1]
    lowest = torch.minimum(top, top + drawn.min_p.double().log().float())
    floor = torch.where(drawn.min_p > 0, lowest, -torch.inf)
    k = torch.where((drawn.top_k > 0) & (drawn.top_k < vocab), drawn.top_k, vocab)
    ranked = torch.nonzero((k < vocab) | (drawn.top_p < 1))[:, 0]
    if len(ranked):
        k = k[ranked]
        widest = int(k[k < vocab].max()) if bool((k < vocab).any()) else 0
        width = min(vocab, max(_PREFIX, widest))
        floor[ranked] = _ranked_floor(scaled[ranked], floor[ranked], k, drawn.top_p[ranked], width)
    return floor


def _ranked_floor(scaled: Tensor, floor: Tensor, k: Tensor, top_p: Tensor, width: int) -> Tensor:
    """Raise `floor` [R] to the k-th largest value, then to the last that top-p keeps; ties with it stay.

    Looks at the `width` largest values of each row (at least k where k is below V), and sorts the whole of those rows
    whose top-p mass lies beyond them.
    """
    vocab = scaled.shape[1]
    ranked = torch.topk(scaled, width, dim=-1).values
    kth = ranked.gather(1, (k.clamp(max=width) - 1)[:, None])[:, 0]
    by_k = torch.where(k < vocab, torch.maximum(floor, kth), floor)
    filtered = torch.nonzero(top_p < 1)[:, 0]
    if len(filtered) == 0:
        return by_k
    result, ranked, top_p, least = by_k.clone(), ranked[filtered], top_p[filtered], by_k[filtered]
    top = ranked[:, :1]
    total = _mass(scaled[filtered], top, least, vocab).sum(dim=-1)
    shares = _mass(ranked, top, least, vocab)
    # Of equal values only the first has all the mass before it that is larger; the others count as it does.
    inside = (shares.cumsum(dim=-1) - shares).double() < (top_p * total.double())[:, None]
    kept = inside.sum(dim=-1).clamp(min=1)
    last = ranked.gather(1, (kept - 1)[:, None])[:, 0]
    result[filtered] = torch.maximum(least, last)
    unsure = (kept == width) & (last >= least)
    if width < vocab and bool(unsure.any()):
        rows = filtered[unsure]
        result[rows] = _ranked_floor(scaled[rows], floor[rows], k[rows], top_p[unsure], vocab)
    return result


def _mass(values: Tensor, top: Tensor, least: Tensor, vocab: int) -> Tensor:
    """Whole units of mass [R, n] of values [R, n]; none below `least` [R]."""
    units = torch.exp_(values.double() - top.double()).mul_(mass_scale(vocab)).add_(0.5).long()
    return units.masked_fill_(values < least[:, None], 0)
