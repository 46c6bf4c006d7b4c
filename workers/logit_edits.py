"""The arithmetic of `LogitEdits`: penalties, biases, bans, then grammars' masks, on a step's logits, in place.

Called by `sampling.py`. Works on the (row, token) pairs that the edits name, all rows at once; only rows with a list of
allowed tokens are touched whole. A row's result depends on its own logits and edits only.

Penalties follow the definitions that the field shares: repetition (Keskar et al., "CTRL", 2019) divides positive and
multiplies negative logits of every token of prompt and output once; then frequency (per occurrence) and presence (once)
are subtracted for tokens of the output.

A row of which everything is banned could not go on: then all its bans give way for this step. A list of allowed tokens
never does, and it is not empty. A grammar's mask is stronger than either: where nothing that it allows is left, bans
and lists give way to it. So some token can always be sampled, by the same rules in every run.
Legend: S rows, V vocabulary, N pairs.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from penstock.workers.scheduler.plan import I32, LogitEdits
from penstock.workers.scheduler.row_arena import gather_ranges

Rows = NDArray[np.intp]


def edited_rows(edits: LogitEdits) -> NDArray[np.bool_]:
    """Which of the S rows change at all."""
    all_offsets = (
        edits.generated_offsets,
        edits.prompt_offsets,
        edits.bias_offsets,
        edits.banned_offsets,
        edits.allowed_offsets,
    )
    found: NDArray[np.bool_] = np.logical_or.reduce([np.diff(offsets) > 0 for offsets in all_offsets])
    found[edits.masked_rows] = True
    return found


def select_rows(edits: LogitEdits, rows: Rows) -> LogitEdits:
    """The edits of these rows only, in this order."""
    generated, generated_offsets = _select(edits.generated, edits.generated_offsets, rows)
    prompt, prompt_offsets = _select(edits.prompt, edits.prompt_offsets, rows)
    bias_ids, bias_offsets = _select(edits.bias_ids, edits.bias_offsets, rows)
    starts = edits.bias_offsets[:-1].astype(np.intp)[rows]
    bias_values, _ = gather_ranges(edits.bias_values, starts, np.diff(edits.bias_offsets)[rows])
    banned, banned_offsets = _select(edits.banned, edits.banned_offsets, rows)
    allowed, allowed_offsets = _select(edits.allowed, edits.allowed_offsets, rows)
    masked_rows, masks = _select_masks(edits, rows)
    return LogitEdits(
        presence=edits.presence[rows],
        frequency=edits.frequency[rows],
        repetition=edits.repetition[rows],
        generated=generated,
        generated_offsets=generated_offsets,
        prompt=prompt,
        prompt_offsets=prompt_offsets,
        bias_ids=bias_ids,
        bias_values=bias_values,
        bias_offsets=bias_offsets,
        banned=banned,
        banned_offsets=banned_offsets,
        allowed=allowed,
        allowed_offsets=allowed_offsets,
        masked_rows=masked_rows,
        masks=masks,
    )


def apply_edits(logits: Tensor, edits: LogitEdits) -> None:
    """Change logits [S, V] float32 in place. Token ids of all but bans must be below V; no row ends all -inf or NaN
    that was not so before."""
    _penalise(logits, edits)
    if len(edits.bias_ids):
        values = torch.from_numpy(edits.bias_values).to(logits.device)
        logits.index_put_(_pairs(edits.bias_ids, edits.bias_offsets, logits.device), values, accumulate=True)
    masked = torch.from_numpy(edits.masked_rows.astype(np.int64)).to(logits.device)
    unlisted = logits[masked] if len(masked) and (len(edits.allowed) or len(edits.banned)) else None
    if len(edits.allowed):
        _keep_allowed(logits, edits)
    if len(edits.banned):
        _ban(logits, edits)
    if len(masked):
        _mask(logits, masked, edits.masks, unlisted)


def _penalise(logits: Tensor, edits: LogitEdits) -> None:
    device = logits.device
    rows, tokens = _pairs(edits.generated, edits.generated_offsets, device)
    if len(edits.prompt) or bool((edits.repetition != 1).any()):
        prompt_rows, prompt_tokens = _pairs(edits.prompt, edits.prompt_offsets, device)
        either = torch.cat((rows, prompt_rows)), torch.cat((tokens, prompt_tokens))
        factor = torch.from_numpy(edits.repetition).to(device)[either[0]]
        before = logits[either]
        # A pair that occurs twice is written twice with the same value.
        logits[either] = torch.where(before > 0, before / factor, before * factor)
    if len(tokens) and (edits.frequency.any() or edits.presence.any()):
        pairs = rows, tokens
        before = logits[pairs]
        # The cells themselves count their occurrences: no table of S x V counters, no sort.
        logits[pairs] = 0.0
        logits.index_put_(pairs, torch.ones(len(tokens), device=device), accumulate=True)
        frequency, presence = (torch.from_numpy(each).to(device)[rows] for each in (edits.frequency, edits.presence))
        logits[pairs] = before - frequency * logits[pairs] - presence


def _keep_allowed(logits: Tensor, edits: LogitEdits) -> None:
    pairs = _pairs(edits.allowed, edits.allowed_offsets, logits.device)
    kept = logits[pairs]
    restricted = np.flatnonzero(np.diff(edits.allowed_offsets))
    logits[torch.from_numpy(restricted).to(logits.device)] = -torch.inf
    logits[pairs] = kept


def _ban(logits: Tensor, edits: LogitEdits) -> None:
    vocab = logits.shape[1]
    rows, tokens = _pairs(edits.banned, edits.banned_offsets, logits.device)
    known = tokens < vocab  # a stop id need not be one of this model's
    pairs = rows[known], tokens[known]
    before = logits[pairs]
    logits[pairs] = -torch.inf
    # Only where at least as many bans as candidates are named can all candidates be banned.
    candidates = np.diff(edits.allowed_offsets)
    candidates[candidates == 0] = vocab
    suspects = torch.from_numpy(np.flatnonzero(np.diff(edits.banned_offsets) >= candidates)).to(logits.device)
    if len(suspects):
        stuck = suspects[logits[suspects].amax(dim=-1) == -torch.inf]
        freed = torch.isin(pairs[0], stuck)
        logits[pairs[0][freed], pairs[1][freed]] = before[freed]


def _mask(logits: Tensor, rows: Tensor, masks: I32, unlisted: Tensor | None) -> None:
    """Keep what the masks [M, words] allow to these rows [M]. `unlisted` [M, V]: their logits before lists and bans."""
    banned = ~_unpacked(masks, logits.device)[:, : logits.shape[1]]
    kept = logits[rows].masked_fill_(banned, -torch.inf)
    if unlisted is not None:
        stuck = kept.amax(dim=-1, keepdim=True) == -torch.inf
        kept = torch.where(stuck, unlisted.masked_fill_(banned, -torch.inf), kept)
    logits[rows] = kept


def _unpacked(masks: I32, device: torch.device) -> Tensor:
    """bool [M, words x 32] of bit masks int32 [M, words], lowest bits first."""
    octets = torch.from_numpy(np.ascontiguousarray(masks, "<i4").view(np.uint8)).to(device)
    bits = octets.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=device)
    return (bits & 1).bool().flatten(1)


def _select_masks(edits: LogitEdits, rows: Rows) -> tuple[I32, I32]:
    """The masks of these rows, and which of them have one."""
    place = np.full(len(edits.presence), -1, np.int32)
    place[edits.masked_rows] = np.arange(len(edits.masked_rows))
    found = place[rows]
    return np.flatnonzero(found >= 0).astype(np.int32), edits.masks[found[found >= 0]]


def _pairs(tokens: I32, offsets: I32, device: torch.device) -> tuple[Tensor, Tensor]:
    """(rows [N], tokens [N]) int64 of flat tokens, on `device`."""
    rows = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    return torch.from_numpy(rows).to(device), torch.from_numpy(tokens.astype(np.int64)).to(device)


def _select(tokens: I32, offsets: I32, rows: Rows) -> tuple[I32, I32]:
    return gather_ranges(tokens, offsets[:-1].astype(np.intp)[rows], np.diff(offsets)[rows])
