"""Philox in Triton gives the published words and the same words as every other backend; noise to the last digits."""

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from penstock.kernels.errors import KernelInputError
from penstock.kernels.gpu import philox
from penstock.kernels.reference import philox as reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Random123's kat_vectors, philox4x32 10: counter, key, answer.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def test_known_answers():
    numbers = [[[int(word, 16) for word in text.split()] for text in row] for row in KNOWN]
    counter, key, answer = (torch.tensor([row[k] for row in numbers], device=DEVICE) for k in range(3))
    assert torch.equal(philox.philox(counter, key), answer)


def test_words_and_noise_of_many_counters():
    rng = np.random.default_rng(0)
    counter, key = (torch.from_numpy(rng.integers(0, 2**32, (300, n))).to(DEVICE) for n in (4, 2))
    assert torch.equal(philox.philox(counter, key).cpu(), reference.philox(counter, key))
    seed = torch.from_numpy(rng.integers(0, 2**64, 300, dtype=np.uint64).view(np.int64)).to(DEVICE)
    columns = [torch.from_numpy(rng.integers(0, most, 300)).to(DEVICE) for most in (8, 2**32, 2**20)]
    torch.testing.assert_close(
        philox.gumbel(seed, *columns).cpu(), reference.gumbel(seed, *columns), atol=1e-14, rtol=1e-14
    )


def test_nothing_asked():
    assert philox.philox(*(torch.empty(0, n, dtype=torch.int64, device=DEVICE) for n in (4, 2))).shape == (0, 4)
    assert len(philox.gumbel(*(torch.empty(0, dtype=torch.int64, device=DEVICE) for _ in range(4)))) == 0


def test_wrong_arguments_are_named():
    with pytest.raises(KernelInputError, match="philox: key"):
        philox.philox(torch.zeros(2, 4, dtype=torch.int64), torch.zeros(3, 2, dtype=torch.int64))
    with pytest.raises(KernelInputError, match="gumbel: token: dtype int32"):
        philox.gumbel(*(torch.zeros(2, dtype=torch.int64) for _ in range(3)), torch.zeros(2, dtype=torch.int32))
