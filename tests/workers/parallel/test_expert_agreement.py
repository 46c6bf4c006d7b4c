"""What ranks tell each other before rows travel: every mismatch is found by every rank."""

import dataclasses

import numpy as np
import pytest
import torch

from penstock.workers.errors import IntegrityError
from penstock.workers.parallel.collectives import Alone
from penstock.workers.parallel.expert_agreement import (
    NO_STATE,
    StepHeader,
    exchange_counts,
    exchange_hosted,
    exchange_states,
    share_placement,
)
from penstock.workers.parallel.expert_placement import even_cuts
from penstock.workers.parallel.expert_planner import PlacementLimits, first_placement

CPU = torch.device("cpu")


class Scripted(Alone):
    """Answers `all_gather` with others' rows behind the own, and `broadcast` with what the leading rank says."""

    def __init__(self, *others, said=()):
        self._others, self._said = others, list(said)
        self.rank, self.width = (1 if said else 0), 1 + len(others)

    def all_gather(self, x):
        return torch.cat([x, *(torch.tensor(other, dtype=x.dtype).reshape(x.shape) for other in self._others)])

    def broadcast(self, x, source=0):
        return self._said.pop(0) if self._said else x


def test_counts_of_all_and_what_they_say_of_the_round():
    header = StepHeader(generation=2, sequence=7, layer=1, round_done=0)
    done, counts = exchange_counts(Scripted([2, 7, 1, 3, 4, 0], [2, 7, 1, -3, 0, 1]), header, np.array([5, 6]), CPU)
    assert done == (0, 3, -3)
    assert counts.tolist() == [[5, 6], [4, 0], [0, 1]]


@pytest.mark.parametrize(("column", "name"), [(0, "generation"), (1, "step"), (2, "layer")])
def test_ranks_elsewhere_are_found(column, name):
    theirs = [2, 7, 1, 0, 0, 0]
    theirs[column] += 1
    with pytest.raises(IntegrityError, match=f"different {name}s"):
        exchange_counts(Scripted(theirs), StepHeader(2, 7, 1, 0), np.zeros(2, dtype=np.int64), CPU)


def test_the_newest_generation_counts_and_the_leading_rank_has_one():
    state = exchange_states(Scripted([4, 9], [NO_STATE, 0]), 3, 2, CPU)
    assert (state.generation, state.generations, state.rounds) == (4, (3, 4, NO_STATE), 9)
    with pytest.raises(IntegrityError, match="cannot be one that joins"):
        exchange_states(Scripted([4, 9]), NO_STATE, 0, CPU)


def test_hosted_experts_by_rank():
    own = np.array([[True, False]])
    assert exchange_hosted(Scripted([0, 1]), own, CPU).tolist() == [[[True, False], [False, True]]]


def test_a_placement_is_taken_over_and_checked_before_use():
    mine = first_placement(1, 4, 2, PlacementLimits(2, 1))
    theirs = dataclasses.replace(mine, slots=mine.slots[:, ::-1].copy(), generation=5)
    theirs = dataclasses.replace(theirs, cuts=even_cuts(theirs.holders()))
    head = torch.tensor([2, 5])
    said = [head, torch.from_numpy(theirs.slots), torch.from_numpy(theirs.cuts)]
    told = share_placement(Scripted([0], said=said), mine, CPU)
    assert told.generation == 5
    assert np.array_equal(told.slots, theirs.slots)
    for wrong in ([torch.tensor([0, 5])], [torch.tensor([99, 5])], [head, said[1], torch.from_numpy(mine.cuts)]):
        with pytest.raises(IntegrityError):
            share_placement(Scripted([0], said=wrong), mine, CPU)
