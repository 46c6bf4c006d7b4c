"""From logits to tokens for a whole step at once: edits, greedy, temperature, top-k, top-p, min-p, seeds, logprobs.

Called by `workers/runner.py`. Every row's token depends only on its own logits and parameters, never on the batch: the
filters are thresholds on the row's values, and the noise is a function of (seed, choice, position, token).

Sampling is the Gumbel-max method (Maddison, Tarlow, Minka 2014): argmax of logits / temperature + Gumbel noise is a
draw from the softmax. Noise is only computed where it can matter: 32-bit noise is at most LARGEST_GUMBEL, so a token
further than that below what the best token reached cannot win, and leaving it out is exact.
Legend: S rows, R rows that are sampled with noise, V vocabulary, K alternatives.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from penstock.kernels import ops
from penstock.workers.logit_edits import Rows, apply_edits, edited_rows, select_rows
from penstock.workers.scheduler.plan import SampledLogprobs, SamplingBatch, StepResult
from penstock.workers.token_logprobs import reduce_logits

LARGEST_GUMBEL = -math.log(-math.log1p(-(2.0**-33)))
# Below this a temperature is greedy: dividing by it would overflow or leave one token anyway.
LEAST_TEMPERATURE = 1e-5
# How many of the largest logits are sorted before a whole row is.
_PREFIX = 256
# Rows are drawn in pieces of about this many logits, which bounds the memory a step takes.
_PIECE_ELEMENTS = 4 << 20


def sample(logits: Tensor, batch: SamplingBatch) -> StepResult:
    """One token per row of logits [S, V] float32, with logprobs (of the logits as they are given) where asked.

    Rows that edit their logits are copied, edited and sampled from piece by piece; `logits` stays as it is.
    """
    tokens = logits.argmax(dim=-1)
    drawn = batch.temperature >= LEAST_TEMPERATURE
    edited = edited_rows(batch.edits) if batch.edits is not None else np.zeros(len(batch), np.bool_)
    for rows in _pieces(np.flatnonzero(drawn), logits.shape[1]):
        tokens[torch.from_numpy(rows)] = _draw(_edited(logits, batch, edited, rows), _Drawn.of(batch, rows))
    for rows in _pieces(np.flatnonzero(edited & ~drawn), logits.shape[1]):
        tokens[torch.from_numpy(rows)] = _edited(logits, batch, edited, rows).argmax(dim=-1)
    return StepResult(tokens.numpy().astype(np.int32), _logprobs(logits, tokens, batch))


def _pieces(rows: Rows, vocab: int) -> list[Rows]:
    """The rows in groups that bound the memory a step takes."""
    step = max(1, _PIECE_ELEMENTS // vocab)
    return [rows[begin : begin + step] for begin in range(0, len(rows), step)]


def _edited(logits: Tensor, batch: SamplingBatch, edited: NDArray[np.bool_], rows: Rows) -> Tensor:
    """Logits [R, V] of these rows after their edits; a copy."""
    piece = logits[torch.from_numpy(rows)]
    if batch.edits is not None and edited[rows].any():
        apply_edits(piece, select_rows(batch.edits, rows))
    return piece


@dataclass(frozen=True, slots=True, eq=False)
class _Drawn:
    """The sampling parameters of R rows as tensors [R]."""

    temperature: Tensor  # float32
    top_k: Tensor  # int64, 0 = all
    top_p: Tensor  # float64
    min_p: Tensor  # float32
    seed: Tensor  # int64 with the bits of an unsigned number
    choice: Tensor  # int64
    position: Tensor  # int64

    @staticmethod
    def of(batch: SamplingBatch, rows: NDArray[np.int64]) -> _Drawn:
        return _Drawn(
            torch.from_numpy(batch.temperature[rows]),
            torch.from_numpy(batch.top_k[rows].astype(np.int64)),
            torch.from_numpy(batch.top_p[rows].astype(np.float64)),
            torch.from_numpy(batch.min_p[rows]),
            torch.from_numpy(batch.seed[rows].view(np.int64)),
            torch.from_numpy(batch.choice[rows].astype(np.int64)),
            torch.from_numpy(batch.position[rows].astype(np.int64)),
        )

    def noise(self, row: Tensor, token: Tensor) -> Tensor:
        """Gumbel noise [n] float64 of tokens [n] of rows [n]."""
        return ops.gumbel(self.seed[row], self.choice[row], self.position[row], token)


def _draw(logits: Tensor, drawn: _Drawn) -> Tensor:
    """Sampled tokens [R] of logits [R, V]."""
    scaled = logits / drawn.temperature[:, None]
    top, top_token = scaled.max(dim=-1)
    reached = top.double() + drawn.noise(torch.arange(len(top)), top_token)
    floor = _floor(scaled, top, drawn)
    # Rounded down to float32, so that no token on the bound is lost to the comparison.
    bound = torch.nextafter((reached - LARGEST_GUMBEL).float(), torch.tensor(-torch.inf))
    row, token = torch.nonzero(scaled >= torch.maximum(floor, bound)[:, None], as_tuple=True)
    scores = torch.full(scaled.shape, -torch.inf, dtype=torch.float64)
    scores[row, token] = scaled[row, token].double() + drawn.noise(row, token)
    return scores.argmax(dim=-1)


def _floor(scaled: Tensor, top: Tensor, drawn: _Drawn) -> Tensor:
    """The least value [R] that a token may have: min-p, then top-k, then top-p of what those leave."""
    vocab = scaled.shape[1]
    floor = torch.where(drawn.min_p > 0, top + drawn.min_p.log(), -torch.inf)
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
    total = torch.logsumexp(scaled.masked_fill(scaled < by_k[:, None], -torch.inf), dim=-1)
    shares = torch.exp((ranked - total[:, None]).double()).masked_fill(ranked < by_k[:, None], 0.0)
    before = shares.cumsum(dim=-1) - shares
    kept = (before < top_p[:, None]).sum(dim=-1).clamp(min=1)
    last = ranked.gather(1, (kept - 1)[:, None])[:, 0]
    result = torch.where(top_p < 1, torch.maximum(by_k, last), by_k)
    beyond = torch.nonzero((top_p < 1) & (kept == width) & (last >= by_k))[:, 0] if width < vocab else kept[:0]
    if len(beyond):
        result[beyond] = _ranked_floor(scaled[beyond], floor[beyond], k[beyond], top_p[beyond], vocab)
    return result


def _logprobs(logits: Tensor, tokens: Tensor, batch: SamplingBatch) -> SampledLogprobs | None:
    """Natural logarithms of the model's own distribution, before edits, temperature and filters."""
    asked = np.flatnonzero(batch.logprobs >= 0)
    if len(asked) == 0:
        return None
    rows = torch.from_numpy(asked)
    chosen = tokens[rows].numpy().astype(np.int32)
    found = reduce_logits(lambda a, b: logits[rows[a:b]], logits.shape[1], chosen, batch.logprobs[asked])
    if len(asked) == len(batch):
        return found
    shape = len(batch), found.top_ids.shape[1]
    spread = SampledLogprobs(
        np.full(len(batch), np.nan, np.float32),
        np.zeros(len(batch), np.int32),
        np.zeros(shape, np.int32),
        np.zeros(shape, np.float32),
    )
    spread.chosen[asked], spread.top_counts[asked] = found.chosen, found.top_counts
    spread.top_ids[asked], spread.top_logprobs[asked] = found.top_ids, found.top_logprobs
    return spread
