"""Philox4x32-10 and Gumbel noise, vectorised over counters in pieces that stay in the cache.

Called through `kernels/ops.py`. Words are held in unsigned 64-bit numbers, so that the product of two is exact.
Source as in `kernels/reference/philox.py`. Legend: n counters.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

U64 = NDArray[np.uint64]

_FIRST, _SECOND = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_WORD = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_ROUNDS = 10
_PIECE = 8192


def philox(counter: Tensor, key: Tensor) -> Tensor:
    """See `ops.philox`."""
    c = counter.numpy().astype(np.uint64)
    k = key.numpy().astype(np.uint64)
    words = _philox_words((c[:, 0], c[:, 1], c[:, 2], c[:, 3]), (k[:, 0], k[:, 1]))
    return torch.from_numpy(np.stack(words, axis=1).astype(np.int64))


def _philox_words(counter: tuple[U64, U64, U64, U64], key: tuple[U64, U64]) -> tuple[U64, U64, U64, U64]:
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for number in range(_ROUNDS):
        # The key moves on by a constant each round, modulo 2^32.
        r0 = (k0 + np.uint64(_WEYL[0] * number & 0xFFFFFFFF)) & _WORD
        r1 = (k1 + np.uint64(_WEYL[1] * number & 0xFFFFFFFF)) & _WORD
        first, second = c0 * _FIRST, c2 * _SECOND
        c0, c2 = (second >> _HALF) ^ c1 ^ r0, (first >> _HALF) ^ c3 ^ r1
        c1, c3 = second & _WORD, first & _WORD
    return c0, c1, c2, c3


def gumbel(seed: Tensor, choice: Tensor, position: Tensor, token: Tensor) -> Tensor:
    """See `ops.gumbel`."""
    keys = seed.numpy().view(np.uint64)
    columns = [column.numpy().astype(np.uint64) for column in (choice, position, token)]
    out = np.empty(len(keys), np.float64)
    zero = np.zeros(1, np.uint64)
    for begin in range(0, len(keys), _PIECE):
        piece = slice(begin, begin + _PIECE)
        key = (keys[piece] & _WORD, keys[piece] >> _HALF)
        words = _philox_words((columns[0][piece], columns[1][piece], columns[2][piece], zero), key)[0]
        out[piece] = -np.log(-np.log((words.astype(np.float64) + 0.5) * 2.0**-32))
    return torch.from_numpy(out)
