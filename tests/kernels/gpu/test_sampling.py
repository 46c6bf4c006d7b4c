"""Sampling in Triton draws the very tokens that the other backends draw, and with the right frequencies."""

import pytest
import torch

pytest.importorskip("triton")

from fakes.sampling_rows import ROW, columns
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.kernels.cpu import sampling as cpu
from penstock.kernels.gpu import sampling

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def drawn(logits, rows):
    return sampling.sample_tokens(logits.to(DEVICE), *(column.to(DEVICE) for column in columns(rows))).tolist()


@given(
    rows=st.lists(ROW, min_size=1, max_size=2),
    vocab=st.sampled_from([1, 2, 33, 200]),
    spread=st.sampled_from([0.1, 1.0, 8.0]),
    rounded=st.booleans(),
    seed=st.integers(0, 9),
)
@settings(max_examples=25, deadline=None)
def test_the_same_tokens_as_on_the_cpu(rows, vocab, spread, rounded, seed):
    logits = torch.randn(len(rows), vocab, generator=torch.Generator().manual_seed(seed)) * spread
    logits = logits.round() if rounded else logits
    assert drawn(logits, rows) == cpu.sample_tokens(logits, *columns(rows)).tolist()


def test_rows_of_several_tiles(monkeypatch):
    monkeypatch.setattr(sampling, "default_config", lambda width: {"TILE": 64, "num_warps": 1, "num_stages": 1})
    logits = torch.randn(4, 700, generator=torch.Generator().manual_seed(3)) * 2
    rows = [{"seed": 5}, {"top_p": 0.9, "seed": 6}, {"top_k": 30, "seed": 7}, {"temperature": 0.0}]
    assert drawn(logits, rows) == cpu.sample_tokens(logits, *columns(rows)).tolist()


def test_rows_without_a_finite_largest_are_greedy():
    nan, inf = float("nan"), float("inf")
    logits = torch.tensor([[0.0, nan, 5.0, nan], [1.0, inf, 0.0, inf], [-inf] * 4, [1e38, 3e38, 3e38, 0.0]])
    hot = [{"temperature": 1e-3, "top_p": 0.5, "top_k": 3, "min_p": 0.1, "seed": 7}] * 4
    assert drawn(logits, hot) == drawn(logits, [{"temperature": 0.0}] * 4) == [1, 1, 0, 1]


def test_signed_zeros_are_one_value():
    logits = torch.tensor([[-0.0, 0.0, -1.0, 0.0, -0.0]]).expand(16, -1)
    rows = [{"top_k": 1, "seed": seed} for seed in range(8)] + [{"top_p": 0.1, "seed": seed} for seed in range(8)]
    tokens = drawn(logits, rows)
    assert tokens == cpu.sample_tokens(logits, *columns(rows)).tolist()
    assert set(tokens) <= {0, 1, 3, 4}
    assert len(set(tokens)) > 2


def test_strided_rows_and_no_rows():
    logits = torch.randn(3, 90, generator=torch.Generator().manual_seed(4))
    rows = [{"seed": seed, "top_k": 20} for seed in range(3)]
    assert drawn(logits[:, 7:57], rows) == drawn(logits[:, 7:57].contiguous(), rows)
    assert drawn(torch.empty(0, 9), []) == []


@pytest.mark.slow  # the tokens are those of the CPU, whose frequencies are tested with every change
def test_draws_have_the_exact_distribution():
    logits, draws = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, 1.5]), 800
    share = torch.softmax(logits.double(), -1) * (logits >= 0.5)
    share = share / share.sum()
    tokens = drawn(logits.expand(draws, -1), [{"min_p": 0.2, "seed": 42, "position": each} for each in range(draws)])
    found = torch.bincount(torch.tensor(tokens), minlength=6) / draws
    assert float((found - share).abs().sum()) / 2 < 0.06  # total variation; 4 kinds in 800 draws
    assert not found[share == 0].any()
