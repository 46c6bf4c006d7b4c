"""Philox4x32-10 against the published known answers, Gumbel noise against its definition and its distribution."""

import math

import numpy as np
import pytest
import torch

from penstock.kernels import ops
from penstock.kernels.cpu import philox as cpu
from penstock.kernels.reference import philox as reference

# Random123's kat_vectors, philox4x32 10: counter, key, answer.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text):
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize("implementation", [cpu, reference, ops])
def test_known_answers(implementation):
    counter, key, answer = (torch.tensor([words(row[k]) for row in KNOWN]) for k in range(3))
    assert torch.equal(implementation.philox(counter, key), answer)


def columns(n, seed=0):
    rng = np.random.default_rng(seed)
    seeds = torch.from_numpy(rng.integers(0, 2**64, n, dtype=np.uint64).view(np.int64))
    return seeds, *(torch.from_numpy(rng.integers(0, most, n)) for most in (8, 2**31, 2**20))


def test_both_implementations_agree():
    arguments = columns(300)
    torch.testing.assert_close(cpu.gumbel(*arguments), reference.gumbel(*arguments), atol=1e-12, rtol=1e-12)


def test_noise_is_defined_by_the_first_word():
    seed, choice, position, token = 0x0123456789ABCDEF, 2, 77, 4096
    word = int(
        reference.philox(torch.tensor([[choice, position, token, 0]]), torch.tensor([[0x89ABCDEF, 0x01234567]]))[0, 0]
    )
    noise = ops.gumbel(*(torch.tensor([value]) for value in (seed, choice, position, token)))
    assert float(noise) == pytest.approx(-math.log(-math.log((word + 0.5) / 2**32)), abs=1e-12)


def test_noise_has_the_gumbel_distribution():
    noise = cpu.gumbel(*columns(40_000)).sort().values
    empirical = (torch.arange(len(noise)) + 0.5) / len(noise)
    assert (torch.exp(-torch.exp(-noise)) - empirical).abs().max() < 0.01


def test_noise_does_not_depend_on_the_batch():
    arguments = columns(20_000)
    whole = cpu.gumbel(*arguments)
    assert torch.equal(whole[12_345:12_346], cpu.gumbel(*(column[12_345:12_346] for column in arguments)))
