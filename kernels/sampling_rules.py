"""The numbers that every implementation of `ops.sample_tokens` must share to draw the same token.

Used by the backends' `sampling.py` and by `workers/sampling.py`. Knows no logits. Legend: V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from penstock.kernels import expect

# 32-bit noise is at most this: a token further below what another reached cannot win.
LARGEST_GUMBEL = -math.log(-math.log1p(-(2.0**-33)))
# Below this a temperature is greedy: dividing by it would overflow or leave one token anyway.
# It is 1e-5 as float32 has it, so that comparisons in either width agree.
LEAST_TEMPERATURE = 9.999999747378752e-06
_DTYPES = {
    "temperature": torch.float32,
    "top_k": torch.int64,
    "top_p": torch.float64,
    "min_p": torch.float32,
    "seed": torch.int64,
    "choice": torch.int64,
    "position": torch.int64,
}


def mass_scale(vocab: int) -> float:
    """Units of probability mass per mass of the best token: a power of two such that V of them fit into 62 bits.

    Masses are whole numbers so that their sums do not depend on the order of addition, and with it on the device.
    """
    return 2.0 ** (62 - vocab.bit_length())


def mass_reach(vocab: int) -> float:
    """How far below the best a value may lie and still weigh at least one unit, with a margin for rounding."""
    return math.log(2 * mass_scale(vocab)) + 1e-3


def check_sample_tokens(logits_SV: Tensor, columns: Sequence[Tensor]) -> None:
    """Raise KernelInputError unless logits are [S, V], V >= 1, and the columns, in the order of the call, fit them."""
    expect.shape("sample_tokens", "logits_SV", logits_SV, None, None)
    expect.dtype("sample_tokens", "logits_SV", logits_SV, torch.float32, torch.float64)
    expect.at_least("sample_tokens", "logits_SV", logits_SV.shape[1], 1)
    for (name, dtype), column in zip(_DTYPES.items(), columns, strict=True):
        expect.shape("sample_tokens", name, column, logits_SV.shape[0])
        expect.dtype("sample_tokens", name, column, dtype)
        expect.device("sample_tokens", name, column, logits_SV)
