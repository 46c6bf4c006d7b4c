"""What ranks with experts must agree on, and the messages that show whether they do.

Called by `expert_parallel.py` and `expert_rebalancing.py`. Everything is plain integers in collectives that every rank
calls; who disagrees is found on every rank alike, so that all raise and none waits. It does not know weights or tokens.
Legend: E experts, R ranks of the whole group, W ranks of the collectives.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from penstock.workers.errors import IntegrityError
from penstock.workers.parallel.collectives import Collectives
from penstock.workers.parallel.expert_placement import ExpertPlacement

I64 = NDArray[np.int64]
Flags = NDArray[np.bool_]

NO_STATE = -1  # generation of a rank that joins


@dataclass(frozen=True, slots=True)
class StepHeader:
    """Sent before a layer's counts. All but `round_done` must be the same everywhere."""

    generation: int  # of the placement
    sequence: int  # of the step
    layer: int
    round_done: int  # number of the rebalancing round this rank has finished, minus it for a failed one, 0 for none

    def numbers(self) -> list[int]:
        """As they travel."""
        return [self.generation, self.sequence, self.layer, self.round_done]


@dataclass(frozen=True, slots=True)
class GroupState:
    """What the ranks of a new group bring along."""

    generations: tuple[int, ...]  # of each rank's placement; NO_STATE for one that joins
    rounds: int  # started so far by any of them

    @property
    def generation(self) -> int:
        """The newest in use: whoever is behind has its weights ready, or nobody would use it."""
        return max(self.generations)


def exchange_counts(
    group: Collectives, header: StepHeader, counts_E: I64, device: torch.device
) -> tuple[tuple[int, ...], I64]:
    """Every rank's `round_done`, and every rank's counts [W, E]. Raises IntegrityError where headers differ."""
    own = torch.tensor([[*header.numbers(), *counts_E.tolist()]], dtype=torch.int64, device=device)
    rows: I64 = group.all_gather(own).cpu().numpy()
    for name, column in (("generation", 0), ("step", 1), ("layer", 2)):
        if (rows[:, column] != rows[0, column]).any():
            raise IntegrityError(f"ranks with experts are at different {name}s: {rows[:, column].tolist()}")
    return tuple(rows[:, 3].tolist()), rows[:, 4:]


def exchange_states(group: Collectives, generation: int, rounds: int, device: torch.device) -> GroupState:
    """What all bring along. Raises IntegrityError where the leading rank knows no placement."""
    own = torch.tensor([[generation, rounds]], dtype=torch.int64, device=device)
    rows = group.all_gather(own).tolist()
    if rows[0][0] == NO_STATE:
        raise IntegrityError("the leading rank of a group with experts cannot be one that joins")
    return GroupState(tuple(row[0] for row in rows), max(row[1] for row in rows))


def exchange_hosted(group: Collectives, own_LE: Flags, device: torch.device) -> Flags:
    """Which experts each rank has in its host's memory, bool [L, E, W]: that decides who can refill what."""
    own = torch.from_numpy(own_LE.astype(np.uint8))[None].to(device)
    hosted: Flags = group.all_gather(own).cpu().numpy().transpose(1, 2, 0) != 0
    return hosted


def share_placement(group: Collectives, mine: ExpertPlacement, device: torch.device) -> ExpertPlacement:
    """The leading rank's, on every rank; the others give theirs for its sizes. Raises IntegrityError on a wrong one."""
    head = torch.tensor([mine.slots.shape[2], mine.generation], dtype=torch.int64, device=device)
    wide, generation = group.broadcast(head).tolist()
    if not 1 <= wide <= max(mine.num_experts, mine.slots.shape[2]):
        raise IntegrityError(f"a placement of {wide} slots for {mine.num_experts} experts")
    slots = np.zeros((*mine.slots.shape[:2], wide), dtype=np.int32)
    if group.rank == 0:
        slots = mine.slots
    told_slots, told_cuts = (
        group.broadcast(torch.from_numpy(part.copy()).to(device)).cpu().numpy() for part in (slots, mine.cuts)
    )
    told = replace(mine, slots=told_slots, cuts=told_cuts, generation=generation)
    told.check_integrity()
    return told
