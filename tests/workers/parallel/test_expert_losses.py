"""Tokens whose experts are gone: named and refused, or left out with the other gates grown."""

import numpy as np
import pytest
import torch

from penstock.workers.errors import ExpertsGoneError
from penstock.workers.parallel.expert_losses import Losses, LossPolicy, named_experts
from penstock.workers.parallel.expert_placement import ExpertPlacement, even_cuts, holders_of

SLOTS = np.array([[[0, 1], [2, 3]], [[0, 1], [-1, -1]]], dtype=np.int32)  # experts 2 and 3 of layer 1 are gone
PLACEMENT = ExpertPlacement(4, SLOTS, even_cuts(holders_of(SLOTS, 4)))
COUNTS = np.array([[1, 1, 0, 0], [0, 0, 1, 0]])


def test_only_steps_that_need_them_are_refused():
    losses = Losses(LossPolicy.REFUSE)
    losses.update(PLACEMENT)
    assert not losses.any_in(0)
    assert losses.any_in(1)
    ids, gates = np.array([[0, 1]]), torch.tensor([[0.5, 0.5]])
    untouched = losses.settle(1, ids, gates, np.array([[1, 1, 0, 0]]))
    assert untouched[0] is ids
    with pytest.raises(ExpertsGoneError, match=r"layer 1: expert 2$") as caught:
        losses.settle(1, ids, gates, COUNTS)  # another rank's token
    assert caught.value.experts == ((1, 2),)
    losses.update(PLACEMENT.without(frozenset({0})))
    with pytest.raises(ExpertsGoneError, match="layer 1: experts 0, 1, 2"):
        losses.settle(1, ids, gates, COUNTS)


def test_gates_grow_in_proportion_and_untouched_tokens_keep_theirs():
    losses = Losses(LossPolicy.DEGRADE)
    losses.update(PLACEMENT)
    ids = np.array([[0, 2, 1], [0, 1, -1], [2, 3, 2]])
    gates = torch.tensor([[0.2, 0.5, 0.3], [0.7, 0.1, 0.0], [0.1, 0.1, 0.1]])
    kept_ids, kept, counts = losses.settle(1, ids, gates, COUNTS)
    assert kept_ids.tolist() == [[0, -1, 1], [0, 1, -1], [-1, -1, -1]]
    assert kept[0].tolist() == pytest.approx([0.4, 0.0, 0.6])
    assert torch.equal(kept[1], gates[1])
    assert kept[2].tolist() == [0.0, 0.0, 0.0]
    assert counts.tolist() == [[1, 1, 0, 0], [0, 0, 0, 0]]
    assert losses.left_out == 4


def test_loss_and_recovery_are_said_once(caplog):
    losses = Losses(LossPolicy.REFUSE)
    with caplog.at_level("WARNING"):
        losses.update(PLACEMENT)
        losses.update(PLACEMENT)
        assert caplog.messages == ["no rank holds layer 1: experts 2, 3"]
        whole = np.array([[[0, 1], [2, 3]]] * 2, dtype=np.int32)
        losses.update(ExpertPlacement(4, whole, even_cuts(holders_of(whole, 4))))
        losses.update(ExpertPlacement(4, whole, even_cuts(holders_of(whole, 4))))
    assert caplog.messages[1:] == ["every expert is held again"]


def test_long_lists_are_cut():
    text = named_experts(tuple((layer, 0) for layer in range(11)))
    assert text.endswith("layer 7: expert 0; and 3 more layers")
