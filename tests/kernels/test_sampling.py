"""Sampling in torch against the plain definition: the same token for every row, and what is left to no definition."""

import math

import numpy as np
import pytest
import torch
from fakes.sampling_rows import DEFAULTS, ROW, columns
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.kernels import ops
from penstock.kernels.cpu import sampling as cpu
from penstock.kernels.errors import KernelInputError
from penstock.kernels.reference import sampling as reference
from penstock.kernels.sampling_rules import LARGEST_GUMBEL, mass_reach, mass_scale


def logits_of(rows, vocab, seed, *, spread=1.0, rounded=False):
    values = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * spread
    return values.round() if rounded else values


@given(
    rows=st.lists(ROW, min_size=1, max_size=5),
    vocab=st.sampled_from([1, 2, 33, 300]),
    spread=st.sampled_from([0.1, 1.0, 8.0]),
    rounded=st.booleans(),
    seed=st.integers(0, 9),
)
@settings(max_examples=60, deadline=None)
def test_both_draw_the_same_token(rows, vocab, spread, rounded, seed):
    logits = logits_of(len(rows), vocab, seed, spread=spread, rounded=rounded)
    assert (
        cpu.sample_tokens(logits, *columns(rows)).tolist() == reference.sample_tokens(logits, *columns(rows)).tolist()
    )


@pytest.mark.parametrize("row", [{}, {"top_p": 0.98}, {"top_k": 600}, {"top_p": 0.7, "temperature": 3.0, "top_k": 900}])
def test_a_short_prefix_is_widened(row, monkeypatch):
    monkeypatch.setattr(cpu, "_PREFIX", 16)
    logits, rows = logits_of(3, 1500, 1, spread=2), [{**row, "seed": seed} for seed in range(3)]
    assert (
        cpu.sample_tokens(logits, *columns(rows)).tolist() == reference.sample_tokens(logits, *columns(rows)).tolist()
    )


@pytest.mark.parametrize("implementation", [cpu, reference])
@pytest.mark.parametrize("row", [{}, {"temperature": 0.5}, {"top_k": 4}, {"top_p": 0.8}, {"min_p": 0.15}])
def test_draws_have_the_exact_distribution(implementation, row):
    logits, draws = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, 1.5]), 20_000 if implementation is cpu else 1000
    share = torch.softmax(logits.double() / {**DEFAULTS, **row}["temperature"], -1)
    ranked = share.sort(descending=True).values
    keep = {"top_k": share >= ranked[3], "top_p": share >= ranked[int((ranked.cumsum(0) < 0.8).sum())]}
    keep["min_p"] = share >= 0.15 * share.max()
    for name in row.keys() & keep.keys():
        share = share * keep[name]
    share = share / share.sum()
    rows = [{**row, "seed": 42, "position": position} for position in range(draws)]
    tokens = implementation.sample_tokens(logits.expand(draws, -1), *columns(rows))
    found = torch.bincount(tokens, minlength=6) / draws
    assert float((found - share).abs().sum()) / 2 < 0.02 * math.sqrt(20_000 / draws)  # total variation
    assert not found[share == 0].any()


@pytest.mark.parametrize("implementation", [cpu, reference])
def test_rows_without_a_finite_largest_are_greedy(implementation):
    nan, inf = float("nan"), float("inf")
    logits = torch.tensor([[0.0, nan, 5.0, nan], [1.0, inf, 0.0, inf], [-inf] * 4, [1e38, 3e38, 3e38, 0.0]])
    rows = [{"temperature": 1e-3, "top_p": 0.5, "top_k": 3, "min_p": 0.1, "seed": 7}] * 4
    assert implementation.sample_tokens(logits, *columns(rows)).tolist() == [1, 1, 0, 1]
    greedy = [{"temperature": 0.0}] * 4
    assert implementation.sample_tokens(logits, *columns(greedy)).tolist() == [1, 1, 0, 1]


@pytest.mark.parametrize("implementation", [cpu, reference])
def test_ties_with_a_threshold_stay(implementation):
    logits = torch.tensor([3.0, 1.0, 1.0, 1.0, 0.0]).expand(600, -1)
    for row in ({"top_k": 2}, {"top_p": 0.75}, {"min_p": 0.13}):
        rows = [{**row, "seed": seed} for seed in range(600)]
        assert set(implementation.sample_tokens(logits, *columns(rows)).tolist()) == {0, 1, 2, 3}


def test_noise_is_only_computed_where_it_can_matter(monkeypatch):
    asked, gumbel = [], cpu.gumbel
    monkeypatch.setattr(cpu, "gumbel", lambda *each: asked.append(len(each[0])) or gumbel(*each))
    logits = torch.full((1, 50_000), -40.0)
    logits[0, :10] = 5.0
    cpu.sample_tokens(logits, *columns([{}]))
    assert asked == [1, 10]


def test_no_rows():
    assert ops.sample_tokens(torch.empty(0, 9), *columns([])).tolist() == []


def test_shared_numbers():
    assert pytest.approx(-math.log(-math.log((2**32 - 0.5) / 2**32))) == LARGEST_GUMBEL
    for vocab in (1, 151_936, 262_144):
        assert (vocab + 1) * (mass_scale(vocab) + 1) < 2**63
        assert int(math.exp(-mass_reach(vocab)) * mass_scale(vocab) + 0.5) == 0


@pytest.mark.parametrize(
    ("argument", "change"),
    [
        ("logits_SV", lambda c: (torch.zeros(2, 0), *c)),
        ("logits_SV", lambda c: (torch.zeros(2, 5, dtype=torch.int64), *c)),
        ("temperature", lambda c: (torch.zeros(2, 5), c[0].double(), *c[1:])),
        ("top_k", lambda c: (torch.zeros(2, 5), c[0], c[1][:1], *c[2:])),
        ("position", lambda c: (torch.zeros(2, 5), *c[:-1], c[-1].int())),
    ],
)
def test_wrong_arguments_are_named(argument, change):
    with pytest.raises(KernelInputError) as refusal:
        ops.sample_tokens(*change(columns([{}, {}])))
    assert refusal.value.argument == argument


def test_large_rows_agree_with_whole_sorts():
    rng = np.random.default_rng(5)
    logits = torch.from_numpy(rng.standard_normal((2, 20_000), np.float32) * 3)
    rows = [{"top_p": 0.95, "top_k": 50, "seed": 3}, {"top_p": 0.6, "min_p": 0.02, "seed": 4}]
    assert (
        cpu.sample_tokens(logits, *columns(rows)).tolist() == reference.sample_tokens(logits, *columns(rows)).tolist()
    )
