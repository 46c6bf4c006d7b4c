"""Log probabilities of chosen tokens and their most likely alternatives, out of raw logits, in bounded memory.

Used by `sampling.py` for the tokens of a step and by `runner.py` for prompt tokens that are scored. "Raw": the model's
own distribution, before logit edits, temperature and filters. However many rows there are, at most about PIECE_ELEMENTS
log probabilities exist at a time.
Legend: M rows, V vocabulary, E hidden size, K alternatives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from penstock.workers.scheduler.plan import I32, SampledLogprobs

PIECE_ELEMENTS = 4 << 20


def pieces(count: int, vocab: int) -> Iterator[tuple[int, int]]:
    """Runs [begin, end) of rows whose logits exist at a time, the same on every rank."""
    step = max(1, PIECE_ELEMENTS // vocab)
    for begin in range(0, count, step):
        yield begin, min(count, begin + step)


def reduce_logits(
    logits_of: Callable[[int, int], Tensor], vocab: int, targets: I32, alternatives: I32
) -> SampledLogprobs:
    """Logprobs of `targets` [M] with `alternatives` [M] (at most V) others; `logits_of(a, b)` gives rows [a, b) x V."""
    count = len(targets)
    wanted = np.minimum(alternatives, vocab).astype(np.int32)
    widest = int(wanted.max(initial=0))
    chosen = np.zeros(count, np.float32)
    top_ids = np.zeros((count, widest), np.int32)
    top_logprobs = np.zeros((count, widest), np.float32)
    for begin, end in pieces(count, vocab):
        normal = torch.log_softmax(logits_of(begin, end), dim=-1)
        target = torch.from_numpy(targets[begin:end].astype(np.int64)).to(normal.device)
        chosen[begin:end] = normal.gather(1, target[:, None])[:, 0].cpu().numpy()
        if widest:
            values, ids = torch.topk(normal, widest, dim=-1)
            top_ids[begin:end], top_logprobs[begin:end] = ids.cpu().numpy(), values.cpu().numpy()
    unused = np.arange(widest) >= wanted[:, None]
    top_ids[unused], top_logprobs[unused] = 0, 0.0
    return SampledLogprobs(chosen, wanted, top_ids, top_logprobs)
