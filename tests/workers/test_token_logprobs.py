"""Logprobs piece by piece: the same numbers for any piece size, and never more than a piece of logits at a time."""

import numpy as np
import pytest
import torch

from penstock.workers import token_logprobs
from penstock.workers.token_logprobs import reduce_logits

VOCAB = 30


@pytest.mark.parametrize("piece", [1, 2 * VOCAB, 7 * VOCAB + 5, 1 << 22])
def test_any_piece_size_gives_the_same(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_logprobs, "PIECE_ELEMENTS", piece)
    logits = torch.randn(11, VOCAB, generator=torch.Generator().manual_seed(0)) * 3
    targets, wanted = np.arange(11, dtype=np.int32), np.array([0, 3, 20, 50] * 2 + [1, 0, 2], np.int32)
    asked: list[int] = []

    def rows(begin: int, end: int) -> torch.Tensor:
        asked.append((end - begin) * VOCAB)
        return logits[begin:end]

    found = reduce_logits(rows, VOCAB, targets, wanted)
    truth = torch.log_softmax(logits.double(), -1)
    assert max(asked) <= max(piece, VOCAB)
    np.testing.assert_allclose(found.chosen, truth[range(11), targets], atol=1e-5)
    assert found.top_counts.tolist() == np.minimum(wanted, VOCAB).tolist()
    for row, count in enumerate(found.top_counts.tolist()):
        values, ids = torch.topk(truth[row], count)
        assert found.top_ids[row, :count].tolist() == ids.tolist()
        np.testing.assert_allclose(found.top_logprobs[row, :count], values, atol=1e-5)
        assert not found.top_ids[row, count:].any()
        assert not found.top_logprobs[row, count:].any()


def test_nothing_asked_is_nothing() -> None:
    none = np.zeros(0, np.int32)
    found = reduce_logits(lambda begin, end: torch.zeros(end - begin, VOCAB), VOCAB, none, none)
    assert found.chosen.shape == (0,)
    assert found.top_ids.shape == (0, 0)
    only_chosen = reduce_logits(
        lambda begin, end: torch.zeros(end - begin, VOCAB), VOCAB, np.array([4], np.int32), np.array([0], np.int32)
    )
    assert only_chosen.chosen.tolist() == [pytest.approx(-np.log(VOCAB))]
    assert only_chosen.top_ids.shape == (1, 0)
