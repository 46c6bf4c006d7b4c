"""From logits to tokens for a whole step at once: edits, then `ops.sample_tokens`, then logprobs where asked.

Called by `workers/runner.py`. Every row's token depends only on its own logits and parameters, never on the batch: the
filters are thresholds on the row's values, and the noise is a function of (seed, choice, position, token). How a token
is drawn is the kernels' affair; this file knows the step's rows.
Legend: S rows, R edited rows, V vocabulary.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from penstock.kernels import ops
from penstock.kernels.sampling_rules import LEAST_TEMPERATURE
from penstock.workers.logit_edits import Rows, apply_edits, edited_rows, select_rows
from penstock.workers.scheduler.plan import SampledLogprobs, SamplingBatch, StepResult
from penstock.workers.token_logprobs import reduce_logits

# Rows are edited in pieces of about this many logits, which bounds the memory a step takes.
_PIECE_ELEMENTS = 4 << 20

Columns = tuple[Tensor, ...]  # temperature, top_k, top_p, min_p, seed, choice, position; each [S]


def sample(logits: Tensor, batch: SamplingBatch) -> StepResult:
    """One token per row of logits [S, V] float32, with logprobs (of the logits as they are given) where asked.

    `logits` stays as it is. Waits for the device that it lies on.
    """
    tokens = draw(logits, batch)
    return StepResult(tokens.cpu().numpy().astype(np.int32), logprobs_of(logits, tokens, batch))


def draw(logits: Tensor, batch: SamplingBatch, columns: Columns | None = None) -> Tensor:
    """One token per row of logits [S, V] float32: [S] int64 on the same device.

    Rows that edit their logits are copied, edited and sampled from piece by piece. `columns` are the parameters of
    `ops.sample_tokens` where they are on the device already.
    """
    drawn = batch.temperature >= LEAST_TEMPERATURE
    edited = edited_rows(batch.edits) if batch.edits is not None else np.zeros(len(batch), np.bool_)
    if not (drawn & ~edited).any():
        tokens = logits.argmax(dim=-1)
    else:
        # Edited rows are drawn below; here they cost no more than a greedy row.
        if columns is None or edited.any():
            columns = _columns(batch, np.where(edited, 0, batch.temperature), logits.device)
        tokens = ops.sample_tokens(logits, *columns)
    for rows in _pieces(np.flatnonzero(edited), logits.shape[1]):
        index = _index(rows, logits)
        own = (column[index] for column in _columns(batch, batch.temperature, logits.device))
        tokens[index] = ops.sample_tokens(_edited(logits, batch, rows), *own)
    return tokens


def _columns(batch: SamplingBatch, temperature: NDArray[np.float32], device: torch.device) -> Columns:
    """The parameters of `ops.sample_tokens` for all rows."""
    columns = (
        temperature.astype(np.float32),
        batch.top_k.astype(np.int64),
        batch.top_p.astype(np.float64),
        batch.min_p,
        batch.seed.view(np.int64),
        batch.choice.astype(np.int64),
        batch.position.astype(np.int64),
    )
    return tuple(torch.from_numpy(column).to(device) for column in columns)


def _index(rows: Rows, like: Tensor) -> Tensor:
    """Row numbers as an index for `like`, on its device."""
    return torch.from_numpy(rows).to(like.device)


def _pieces(rows: Rows, vocab: int) -> list[Rows]:
    """The rows in groups that bound the memory a step takes."""
    step = max(1, _PIECE_ELEMENTS // vocab)
    return [rows[begin : begin + step] for begin in range(0, len(rows), step)]


def _edited(logits: Tensor, batch: SamplingBatch, rows: Rows) -> Tensor:
    """Logits [R, V] of these rows after their edits; a copy."""
    piece = logits[_index(rows, logits)]
    if batch.edits is not None:
        apply_edits(piece, select_rows(batch.edits, rows))
    return piece


def logprobs_of(logits: Tensor, tokens: Tensor, batch: SamplingBatch) -> SampledLogprobs | None:
    """Natural logarithms of the model's own distribution, before edits, temperature and filters."""
    asked = np.flatnonzero(batch.logprobs >= 0)
    if len(asked) == 0:
        return None
    rows = _index(asked, logits)
    chosen = tokens[rows].cpu().numpy().astype(np.int32)
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
