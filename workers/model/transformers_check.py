"""The last word at load: a module with our attention must give the logits that it gave with transformers' own.

Called by `transformers_backend.py`. Two random sequences, first each by itself as transformers runs them; then packed
beside each other and in three steps, of which the last has one token of each. Knows nothing of the architecture.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from penstock.kernels import ops
from penstock.kernels.ragged import RaggedBatch
from penstock.workers.errors import IntegrityError, ModelError
from penstock.workers.kv.layout import KVLayout
from penstock.workers.model.loading import TORCH_DTYPES
from penstock.workers.model.port import DecoderModel

CUTS = ((0, 11, 24, 25), (0, 7, 13, 14))  # where the steps of both sequences begin and end
CHECKED_POSITIONS = CUTS[0][-1]
PROMPTS = 2  # a mixture of experts may be of two minds on a token, but hardly in both
FLOAT32_TOLERANCE = 1e-4  # of the largest logit, at the worst token
HALF_TOLERANCE = {"bfloat16": 8e-2, "float16": 1e-2}  # of the largest logit, at the median token


@dataclass(frozen=True, slots=True, eq=False)
class StockLogits:
    """What transformers' own attention gave: for each sequence its tokens [n] and logits [n, V] float32."""

    tokens: list[Tensor]
    logits: list[Tensor]


def stock_logits(model: Any, vocab_size: int) -> list[StockLogits]:
    """For `PROMPTS` random pairs of sequences. Raises ModelError where the module and its configuration disagree."""
    results = []
    for seed in range(PROMPTS):
        generator = torch.Generator().manual_seed(seed)
        tokens = [torch.randint(vocab_size, (cuts[-1],), generator=generator) for cuts in CUTS]
        logits = [model(input_ids=row[None], use_cache=False).logits[0].float() for row in tokens]
        if logits[0].shape != (len(tokens[0]), vocab_size):
            raise ModelError(f"its logits are {list(logits[0].shape)}, its vocab_size is {vocab_size}")
        results.append(StockLogits(tokens, logits))
    return results


def require_equal_logits(model: DecoderModel, layout: KVLayout, stock: list[StockLogits]) -> None:
    """Raises ModelError unless paged and packed execution agrees on one of the prompts."""
    tolerance = HALF_TOLERANCE.get(layout.dtype, FLOAT32_TOLERANCE)
    errors = []
    for one in stock:
        errors.append(_disagreement(paged_logits(model, layout, one.tokens), one.logits, layout.dtype))
        if errors[-1] <= tolerance:  # a NaN is no agreement
            return
    raise ModelError(
        f"its attention cannot be paged exactly: logits differ from transformers' own by {errors[-1]:.1e} of the "
        f"largest, and {tolerance:.0e} is allowed in {layout.dtype}"
    )


def paged_logits(model: DecoderModel, layout: KVLayout, tokens: list[Tensor]) -> list[Tensor]:
    """Logits [n, V] of both sequences, packed and in steps."""
    tables = _tables(layout)
    shape = (tables.size, layout.num_layers, 2, layout.num_kv_heads, layout.block_size, layout.head_dim)
    kv = torch.zeros(shape, dtype=TORCH_DTYPES[layout.dtype])
    parts: list[list[Tensor]] = [[] for _ in CUTS]
    for spans in zip(*map(itertools.pairwise, CUTS), strict=True):
        counts = [end - begin for begin, end in spans]
        offsets = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
        plan = ops.plan_attention(kv, RaggedBatch(np.array([b for b, _ in spans], np.int32), offsets, tables))
        step = torch.cat([row[begin:end] for row, (begin, end) in zip(tokens, spans, strict=True)])
        positions = torch.cat([torch.arange(begin, end) for begin, end in spans])
        logits = model.logits(model.forward(step, positions, kv, plan, torch.arange(len(step))))
        if logits is None:
            raise IntegrityError("logits are compared on rank 0 only")
        for part, rows in zip(parts, torch.split(logits, counts), strict=True):
            part.append(rows)
    return [torch.cat(part) for part in parts]


def _tables(layout: KVLayout) -> np.ndarray[Any, np.dtype[np.int32]]:
    """Blocks of both sequences, those of one between those of the other."""
    width = max(layout.blocks_for(cuts[-1]) for cuts in CUTS)
    return np.arange(width * len(CUTS), dtype=np.int32).reshape(width, len(CUTS)).T.copy()


def _disagreement(ours: list[Tensor], theirs: list[Tensor], dtype: str) -> float:
    """Largest difference of a token's logits over the largest logit: at the worst token, in halves at the median."""
    mine, stock = torch.cat(ours), torch.cat(theirs)
    per_token = (mine - stock).abs().amax(dim=-1) / stock.abs().max().clamp(min=1e-6)
    chosen = per_token.median() if dtype in HALF_TOLERANCE else per_token.max()
    return float(chosen) if torch.isfinite(per_token).all() else float("nan")
