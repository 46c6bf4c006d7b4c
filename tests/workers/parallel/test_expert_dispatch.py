"""How rows are split and ordered: nothing lost, shares met, own rows first, and the same from every rank's side."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.workers.errors import IntegrityError
from penstock.workers.parallel.expert_dispatch import split_rows
from penstock.workers.parallel.expert_placement import WHOLE, cuts_from_shares


def case(seed):
    chance = np.random.default_rng(seed)
    ranks, experts = int(chance.integers(1, 6)), int(chance.integers(1, 9))
    held = chance.random((1, experts, ranks)) < 0.6
    cuts = cuts_from_shares(chance.random((1, experts, ranks)), held)[0]
    ids = [chance.integers(-1, experts, (int(chance.integers(0, 9)), 3)) for _ in range(ranks)]
    counts = np.stack([np.bincount(own.reshape(-1) + 1, minlength=experts + 1)[1:] for own in ids])
    return held[0], cuts, ids, counts, int(chance.integers(0, 10_000))


@given(st.integers(0, 10_000))
@settings(max_examples=150, deadline=None)
def test_rows_are_conserved_and_shares_met_to_within_one(seed):
    held, cuts, _, counts, turn = case(seed)
    split = split_rows(counts, cuts, turn)
    here = held.any(axis=1)
    assert (split.rows >= 0).all()
    assert np.array_equal(split.rows.sum(axis=2), counts * here)
    exact = counts.sum(axis=0)[:, None] * np.diff(cuts, axis=1) / WHOLE
    computed = split.rows.sum(axis=0)
    assert (np.abs(computed - exact)[here] < 1).all()
    # Own rows come before others': where a rank computes rows of others, none of its own has left.
    for rank in range(len(counts)):
        others = computed[:, rank] - split.rows[rank, :, rank]
        left = counts[rank] * here - split.rows[rank, :, rank]
        assert (np.minimum(others, left) == 0).all()


@given(st.integers(0, 10_000))
@settings(max_examples=100, deadline=None)
def test_what_leaves_is_what_arrives_in_order_of_sender_expert_and_token(seed):
    held, cuts, ids, counts, turn = case(seed)
    # Choices of experts without copy are left out before, as the policy for losses does.
    ids = [np.where(held.any(axis=1)[own], own, -1) for own in ids]
    split = split_rows(counts * held.any(axis=1), cuts, turn)
    ranks = len(counts)
    leaving = {}
    for rank in range(ranks):
        order = split.departure(rank, ids[rank].reshape(-1))
        assert len(set(order.tolist())) == len(order)
        flat = ids[rank].reshape(-1)
        pieces = np.split(order, np.cumsum([*np.delete(split.sent(rank), rank)])[: ranks - 1])
        targets = [*(other for other in range(ranks) if other != rank), rank]
        for target, piece in zip(targets, pieces, strict=True):
            leaving[rank, target] = flat[piece]
            assert sorted(zip(flat[piece], piece, strict=True)) == list(zip(flat[piece], piece, strict=True))
    for rank in range(ranks):
        senders = [*(other for other in range(ranks) if other != rank), rank]
        arriving = np.concatenate([leaving[sender, rank] for sender in senders])
        assert np.array_equal(split.arriving_experts(rank), arriving)
        assert held[arriving, rank].all()
        received = split.received(rank)
        assert received[rank] == 0
        assert int(received.sum()) + split.kept(rank) == len(arriving) == split.rank_rows()[rank]


def test_odd_rows_even_out_over_turns():
    cuts = cuts_from_shares(np.array([[[0.7, 0.2, 0.1]]]), np.ones((1, 1, 3), dtype=bool))[0]
    total = sum(split_rows(np.array([[1], [0], [0]]), cuts, turn).rank_rows() for turn in range(1000))
    assert total == pytest.approx([700, 200, 100], abs=3)


def test_choices_that_were_not_counted_are_refused():
    cuts = cuts_from_shares(np.ones((1, 2, 1)), np.ones((1, 2, 1), dtype=bool))[0]
    with pytest.raises(IntegrityError, match="3 rows have an expert, 2 were announced"):
        split_rows(np.array([[1, 1]]), cuts, 0).departure(0, np.array([0, 1, 1, -1]))
