"""Philox4x32-10 and Gumbel noise in plain Python integers and float64: the definition of both.

Called through `kernels/ops.py`. Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3",
SC 2011, section 3.3. Legend: n counters.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF
_ROUNDS = 10


def philox(counter: Tensor, key: Tensor) -> Tensor:
    """See `ops.philox`."""
    words = [_philox_words(c, k) for c, k in zip(counter.tolist(), key.tolist(), strict=True)]
    return torch.tensor(words, dtype=torch.int64, device=counter.device).view(counter.shape)


def _philox_words(counter: list[int], key: list[int]) -> list[int]:
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        first, second = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (second >> 32) ^ c1 ^ k0, second & _WORD, (first >> 32) ^ c3 ^ k1, first & _WORD
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return [c0, c1, c2, c3]


def gumbel(seed: Tensor, choice: Tensor, position: Tensor, token: Tensor) -> Tensor:
    """See `ops.gumbel`."""
    noise = []
    for s, *counter in zip(seed.tolist(), choice.tolist(), position.tolist(), token.tolist(), strict=True):
        word = _philox_words([*counter, 0], [s & _WORD, (s >> 32) & _WORD])[0]
        noise.append(-math.log(-math.log((word + 0.5) / 2**32)))
    return torch.tensor(noise, dtype=torch.float64, device=seed.device)
