"""The states of all ranks' rows come together in the order of the whole plan, on rank 0 only."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from penstock.workers.errors import IntegrityError
from penstock.workers.parallel.attention_ranks import NO_SAMPLING
from penstock.workers.parallel.rank_states import RankStates
from penstock.workers.parallel.shared_prompts import Banks
from penstock.workers.scheduler.plan import ScoredPrompt, StepPlan

SIZE = 8


class Hub:
    """Collectives of several ranks in one thread: what each sent is kept until rank 0 receives."""

    def __init__(self, width: int) -> None:
        self.width = width
        self.sent: dict[int, torch.Tensor] = {}

    def rank_of(self, rank: int):
        hub = self

        class Side:
            width = hub.width

            def all_to_all(self, rows, send, receive):
                hub.sent[rank] = rows
                assert list(send) == [len(rows)] + [0] * (hub.width - 1)
                if rank:
                    assert not any(receive)
                    return rows[:0]
                assert [len(hub.sent[each]) for each in range(hub.width)] == list(receive)
                return torch.cat([hub.sent[each] for each in range(hub.width)])

        side = Side()
        side.rank = rank
        return side


def int32(*values):
    return np.array(values, np.int32)


def plan() -> StepPlan:
    """Rows 0 to 4 live on ranks 1, 0, 1, 2, 0; row 3 only fills its cache, row 4 scores tokens 8 and 9."""
    tables = int32([9, 0], [1, 2], [12, 13], [20, 0], [3, 4])
    return StepPlan(
        step=1,
        slots=int32(5, 6, 7, 8, 9),
        starts=int32(3, 3, 3, 0, 0),
        offsets=int32(0, 1, 2, 3, 7, 12),
        token_ids=np.arange(100, 112, dtype=np.int32),
        block_tables=tables,
        sample_rows=int32(0, 1, 2, 4),
        sampling=NO_SAMPLING,
        num_decode=3,
        scored=ScoredPrompt(int32(8, 9), int32(1, 2), int32(0, 0)),
    )


def test_states_come_together_in_order():
    hub, whole = Hub(3), plan()
    ranks = [RankStates(hub.rank_of(rank), Banks(SIZE), 4) for rank in range(3)]
    cuts = [states.cut(whole) for states in ranks]
    parts = [states.part(cut) for states, cut in zip(ranks, cuts, strict=True)]
    assert [part.token_ids.tolist() for part in parts] == [
        [101, 107, 108, 109, 110, 111],
        [100, 102],
        [103, 104, 105, 106],
    ]
    assert [part.block_tables.tolist() for part in parts] == [[[1, 2], [3, 4]], [[1, 0], [4, 5]], [[4, 0]]]
    assert parts[0].scored.token_rows.tolist() == [2, 3]
    # The state of a row or scored token is the token that stands for it.
    hidden = [torch.tensor([[101.0], [111.0], [108.0], [109.0]]), torch.tensor([[100.0], [102.0]]), torch.empty(0, 1)]
    for rank in (2, 1):
        assert ranks[rank].gather(cuts[rank], hidden[rank]).shape == (0, 1)
        assert not ranks[rank].samples
    gathered = ranks[0].gather(cuts[0], hidden[0])
    assert gathered[:, 0].tolist() == [100, 101, 102, 111, 108, 109]


def test_ranks_that_are_left_go_on_under_their_numbers():
    """Rank 1 is lost, and with it its rows; ranks 0 and 2 meet as a group of two."""
    whole = plan()
    kept = dataclasses.replace(
        whole,
        slots=whole.slots[[1, 3, 4]],
        starts=whole.starts[[1, 3, 4]],
        offsets=int32(0, 1, 5, 10),
        token_ids=whole.token_ids[[1, *range(3, 12)]],
        block_tables=whole.block_tables[[1, 3, 4]],
        sample_rows=int32(0, 1, 2),
        num_decode=1,
        scored=None,
    )
    before = [RankStates(Hub(3).rank_of(rank), Banks(SIZE), 4) for rank in (0, 2)]
    hub = Hub(2)
    for position, states in enumerate(before):
        states.regroup(hub.rank_of(position), (0, 2))
        assert states.members == (0, 2)
    cuts = [states.cut(kept) for states in before]
    parts = [states.part(cut) for states, cut in zip(before, cuts, strict=True)]
    assert [part.token_ids.tolist() for part in parts] == [[101, 107, 108, 109, 110, 111], [103, 104, 105, 106]]
    assert parts[1].block_tables.tolist() == [[4, 0]]
    before[1].gather(cuts[1], torch.tensor([[106.0]]))
    gathered = before[0].gather(cuts[0], torch.tensor([[101.0], [111.0]]))
    assert gathered[:, 0].tolist() == [101, 106, 111]


def test_states_of_other_rows_are_refused():
    states = RankStates(Hub(3).rank_of(1), Banks(SIZE), 4)
    with pytest.raises(IntegrityError, match="1 hidden states of 2"):
        states.gather(states.cut(plan()), torch.empty(1, 4))
