"""Moves: only what lacks travels, from whoever is asked least, in rounds that bound what is in flight."""

import numpy as np

from penstock.workers.parallel.expert_moves import hosted_experts, plan_moves, rounds, suppliers
from penstock.workers.parallel.expert_placement import ExpertPlacement, even_cuts, holders_of


def placement(slots, experts=4):
    array = np.array([slots], dtype=np.int32)
    return ExpertPlacement(experts, array, even_cuts(holders_of(array, experts)))


NOTHING = np.zeros((1, 4, 3), dtype=bool)


def test_each_rank_gets_what_it_lacks_from_whoever_was_asked_least():
    before = placement([[0, 1], [0, 1], [2, 3]])
    after = placement([[0, 2], [3, 1], [0, 1]])
    moves = plan_moves(before, after, (0, 1, 2), NOTHING)
    named = {(move.expert, move.source, move.target, move.slot) for move in moves}
    assert {(2, 2, 0, 1), (3, 2, 1, 0)} <= named
    assert {(expert, target, slot) for expert, _, target, slot in named} >= {(0, 2, 0), (1, 2, 1)}
    assert sorted(source for _, source, target, _ in named if target == 2) == [0, 1]


def test_own_host_memory_first_then_slots_then_others_host_memory():
    before = placement([[0, -1], [1, -1], [-1, -1]])
    after = placement([[0, 1], [1, 2], [3, 2]])
    hosted = NOTHING.copy()
    hosted[0, 1, 0] = hosted[0, 2, 0] = hosted[0, 3, 2] = hosted[0, 0, 1] = True
    moves = {(move.expert, move.target): move.source for move in plan_moves(before, after, (0, 1, 2), hosted)}
    assert moves == {(1, 0): 0, (2, 1): 0, (3, 2): 2, (2, 2): 0}
    assert plan_moves(before, after, (1, 2), hosted)[0].source != 0
    assert not suppliers(before, (1, 2), hosted)[0, :, 0].any()


def test_what_nobody_has_is_left_out_and_new_slots_are_filled():
    before = placement([[0], [1], [2]])
    after = placement([[0, 3], [1, 0], [2, -1]])
    assert [(move.expert, move.slot, move.target) for move in plan_moves(before, after, (0, 1, 2), NOTHING)] == [
        (0, 1, 1)
    ]


def test_rounds_send_and_receive_one_expert_per_rank():
    chance = np.random.default_rng(0)
    before = placement([chance.permutation(40)[:20] for _ in range(4)], 40)
    after = placement([chance.permutation(40)[:20] for _ in range(4)], 40)
    hosted = np.zeros((1, 40, 4), dtype=bool)
    moves = plan_moves(before, after, (0, 1, 2, 3), hosted)
    planned = rounds(moves)
    assert sorted((move.expert, move.target) for each in planned for move in each) == sorted(
        (move.expert, move.target) for move in moves if move.source != move.target
    )
    for each in planned:
        assert len({move.source for move in each}) == len({move.target for move in each}) == len(each)
    most = max(max(np.bincount([move.source for move in moves])), max(np.bincount([move.target for move in moves])))
    assert len(planned) < 2 * most


def test_hosted_copies_are_even_and_distinct():
    hosted = hosted_experts(10, 5, 2)
    assert (hosted.sum(axis=1) == 2).all()
    assert (hosted.sum(axis=0) == 4).all()
    assert hosted_experts(3, 2, 5).all()
