"""Sampling against a plain per-row definition, the distributions it draws from, and independence of the batch."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.kernels.cpu import sampling as kernel
from penstock.kernels.reference import philox
from penstock.workers import sampling
from penstock.workers.sampling import sample
from penstock.workers.scheduler.plan import LogitEdits, SamplingBatch

DEFAULTS = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 0, "choice": 0, "position": 0}
DTYPES = {
    "temperature": "f4",
    "top_k": "i4",
    "top_p": "f4",
    "min_p": "f4",
    "seed": "u8",
    "choice": "i4",
    "position": "i4",
}


def batch(rows, logprobs=None):
    columns = {key: np.array([{**DEFAULTS, **row}[key] for row in rows], DTYPES[key]) for key in DEFAULTS}
    return SamplingBatch(**columns, logprobs=np.array([-1] * len(rows) if logprobs is None else logprobs, np.int32))


def kept_tokens(logits, row):
    """The definition: min-p on the tempered distribution, then top-k, then top-p of what is left; ties stay."""
    scaled = (logits / np.float32(row["temperature"])).double()
    kept = scaled >= scaled.max() + (math.log(np.float32(row["min_p"])) if row["min_p"] > 0 else -math.inf)
    if 0 < row["top_k"] < len(scaled):
        kept &= scaled >= scaled.masked_fill(~kept, -math.inf).sort(descending=True).values[row["top_k"] - 1]
    if row["top_p"] < 1:
        shares = torch.softmax(scaled.masked_fill(~kept, -math.inf), -1)
        ranked, order = shares.sort(descending=True)
        inside = (ranked.cumsum(0) - ranked) < float(np.float32(row["top_p"]))
        kept &= scaled >= scaled[order[inside]].min()
    return scaled, kept


def defined(logits, row):
    row = {**DEFAULTS, **row}
    if row["temperature"] < sampling.LEAST_TEMPERATURE:
        return int(logits.argmax())
    scaled, kept = kept_tokens(logits, row)
    vocab = torch.arange(len(logits))
    seed = torch.full_like(vocab, np.array(row["seed"], np.uint64).view(np.int64).item())
    noise = philox.gumbel(seed, vocab * 0 + row["choice"], vocab * 0 + row["position"], vocab)
    return int((scaled + noise).masked_fill(~kept, -math.inf).argmax())


ROWS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.2, 0.7, 1.0, 1.7]),
        "top_k": st.sampled_from([0, 1, 2, 7, 40, 10**6]),
        "top_p": st.sampled_from([1.0, 0.99, 0.9, 0.5, 0.01]),
        "min_p": st.sampled_from([0.0, 0.01, 0.2, 1.0]),
        "seed": st.integers(0, 2**64 - 1),
        "choice": st.integers(0, 7),
        "position": st.integers(0, 5000),
    }
)


@given(rows=st.lists(ROWS, min_size=1, max_size=6), spread=st.sampled_from([0.1, 1.0, 6.0]), seed=st.integers(0, 9))
@settings(max_examples=120, deadline=None)
def test_every_row_follows_the_definition(rows, spread, seed):
    logits = torch.randn(len(rows), 300, generator=torch.Generator().manual_seed(seed)) * spread
    tokens = sample(logits, batch(rows)).token_ids.tolist()
    assert tokens == [defined(logits[number], row) for number, row in enumerate(rows)]


@pytest.mark.parametrize(
    "row", [{}, {"top_p": 0.98}, {"top_k": 300}, {"top_p": 0.7, "temperature": 3.0}, {"min_p": 1e-3}]
)
def test_large_vocabularies_take_every_path(row, monkeypatch):
    monkeypatch.setattr(kernel, "_PREFIX", 16)
    logits = torch.randn(4, 3000, generator=torch.Generator().manual_seed(1)) * 2
    rows = [{**row, "seed": seed, "position": 9} for seed in range(4)]
    assert sample(logits, batch(rows)).token_ids.tolist() == [defined(logits[n], r) for n, r in enumerate(rows)]


def test_a_row_does_not_depend_on_its_neighbours(monkeypatch):
    kinds = [{"temperature": 0.0}, {}, {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.1}, {"top_k": 700, "top_p": 0.95}]
    rows = [{**kinds[n % 6], "seed": n * 10**17, "position": n, "choice": n % 3} for n in range(36)]
    logits = torch.randn(36, 1000, generator=torch.Generator().manual_seed(2)) * 3
    together = sample(logits, batch(rows)).token_ids.tolist()
    assert [int(sample(logits[n : n + 1], batch([row])).token_ids[0]) for n, row in enumerate(rows)] == together
    monkeypatch.setattr(kernel, "_PIECE_ELEMENTS", 5000)
    assert sample(logits, batch(rows)).token_ids.tolist() == together


@pytest.mark.parametrize("row", [{}, {"temperature": 0.5}, {"top_k": 4}, {"top_p": 0.8}, {"min_p": 0.15}])
def test_draws_have_the_right_distribution(row):
    logits, draws = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, 1.5]), 20_000
    scaled, kept = kept_tokens(logits, {**DEFAULTS, **row})
    expected = torch.softmax(scaled.masked_fill(~kept, -math.inf), -1)
    rows = [{**row, "seed": 42, "position": position} for position in range(draws)]
    tokens = sample(logits.expand(draws, -1), batch(rows)).token_ids
    shares = torch.from_numpy(np.bincount(tokens, minlength=6)) / draws
    assert (shares - expected).abs().max() < 4 * math.sqrt(0.25 / draws)


def test_a_tiny_temperature_is_greedy_and_a_tiny_top_p_keeps_one():
    logits = torch.tensor([[1.0, 5.0, 4.9]]).expand(50, -1)
    rows = [{"temperature": 1e-9, "seed": seed} for seed in range(25)] + [
        {"top_p": 1e-6, "seed": seed} for seed in range(25)
    ]
    assert set(sample(logits, batch(rows)).token_ids.tolist()) == {1}


def test_rows_that_are_not_numbers_do_not_disturb_others():
    logits = torch.randn(3, 100, generator=torch.Generator().manual_seed(3))
    rows = [{"seed": n, "top_p": 0.9, "top_k": 50} for n in range(3)]
    before = sample(logits, batch(rows)).token_ids
    spoiled = logits.clone()
    spoiled[1] = float("nan")
    after = sample(spoiled, batch(rows)).token_ids
    assert (after[[0, 2]] == before[[0, 2]]).all()
    assert 0 <= after[1] < 100


def test_logprobs_are_of_the_raw_distribution():
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(4))
    rows = [{"temperature": 0.0}, {"temperature": 2.0, "top_k": 3}, {}, {"temperature": 0.5}]
    result = sample(logits, batch(rows, logprobs=[2, 0, -1, 5]))
    found, truth = result.logprobs, torch.log_softmax(logits.double(), -1)
    assert found.top_counts.tolist() == [2, 0, 0, 5]
    assert found.top_ids.shape == found.top_logprobs.shape == (4, 5)
    assert np.isnan(found.chosen).tolist() == [False, False, True, False]
    for row in (0, 1, 3):
        count = found.top_counts[row]
        assert found.chosen[row] == pytest.approx(float(truth[row, result.token_ids[row]]), abs=1e-6)
        assert found.top_ids[row, :count].tolist() == truth[row].topk(int(count)).indices.tolist()
        assert found.top_logprobs[row, :count] == pytest.approx(truth[row].topk(int(count)).values.numpy(), abs=1e-6)
        assert not found.top_ids[row, count:].any()


def test_more_alternatives_than_tokens_and_no_logprobs_at_all():
    logits = torch.randn(2, 3)
    assert sample(logits, batch([{}, {}], logprobs=[20, -1])).logprobs.top_counts.tolist() == [3, 0]
    assert sample(logits, batch([{}, {}])).logprobs is None


def test_no_rows():
    assert len(sample(torch.empty(0, 10), batch([])).token_ids) == 0


def edits(rows):
    """`rows`: per row the tokens that are banned, and a bias or None."""
    none, zeros = np.zeros(0, np.int32), np.zeros(len(rows) + 1, np.int32)
    column, biased = np.zeros(len(rows), np.float32), [bias for _, bias in rows if bias is not None]
    counts = [[bias is not None for _, bias in rows], [len(banned) for banned, _ in rows]]
    bias_offsets, banned_offsets = (np.concatenate(([0], np.cumsum(each))).astype(np.int32) for each in counts)
    banned = np.array([token for tokens, _ in rows for token in tokens], np.int32)
    ids, values = np.array([b[0] for b in biased], np.int32), np.array([b[1] for b in biased], np.float32)
    biases = (ids, values, bias_offsets)
    return LogitEdits(
        column, column, column + 1, none, zeros, none, zeros, *biases, banned, banned_offsets, none, zeros
    )


@pytest.mark.parametrize("piece", [100, 5000, 1 << 22])
def test_edited_rows_are_sampled_from_edited_logits_and_others_from_their_own(piece, monkeypatch):
    monkeypatch.setattr(sampling, "_PIECE_ELEMENTS", piece)
    logits = torch.randn(12, 300, generator=torch.Generator().manual_seed(6)) * 2
    rows = [{"temperature": n % 3 * 0.6, "top_p": 0.9 if n % 2 else 1.0, "seed": n} for n in range(12)]
    best = logits.topk(4).indices.tolist()
    wishes = [(best[n] if n % 4 == 1 else (), (7, 9.0) if n % 4 == 2 else None) for n in range(12)]
    before = logits.clone()
    found = sample(logits, dataclasses.replace(batch(rows, logprobs=[2] * 12), edits=edits(wishes)))
    assert torch.equal(logits, before)
    for n, (row, (banned, bias)) in enumerate(zip(rows, wishes, strict=True)):
        changed = logits[n].clone()
        changed[list(banned)] = -math.inf
        if bias is not None:
            changed[bias[0]] += bias[1]
        assert found.token_ids[n] == defined(changed, row), n
    truth = torch.log_softmax(logits.double(), -1)
    np.testing.assert_allclose(found.logprobs.chosen, truth[range(12), found.token_ids], atol=1e-5)
    assert found.logprobs.top_ids.tolist() == [tokens[:2] for tokens in best]


def test_a_row_with_one_candidate_left_takes_it_under_every_filter():
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(8))
    rows = [{"top_p": 0.5}, {"top_k": 20}, {"min_p": 0.3}, {"temperature": 2.0, "top_k": 49, "top_p": 0.999}]
    wishes = [(tuple(token for token in range(50) if token != 30 + n), None) for n in range(4)]
    found = sample(logits, dataclasses.replace(batch(rows), edits=edits(wishes)))
    assert found.token_ids.tolist() == [30, 31, 32, 33]


def test_twenty_alternatives_beside_a_token_that_is_not_among_them():
    logits = torch.arange(100.0)[None] / 10
    result = sample(logits, dataclasses.replace(batch([{}], logprobs=[20]), edits=edits([(range(1, 100), None)])))
    assert result.token_ids.tolist() == [0]
    assert result.logprobs.top_ids[0].tolist() == list(range(99, 79, -1))
    assert result.logprobs.chosen[0] < result.logprobs.top_logprobs[0].min()
