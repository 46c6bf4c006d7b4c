"""How the oracles of a group's ranks add up their sums: over the channel of steps, without torch.

Handed to `oracle.py` by the assembly: `LeaderSums` on rank 0, `FollowerSums` on the others. A model's ranks use
collectives instead. Time that rank 0 waits here is kept apart from its own work.
"""

from __future__ import annotations

import numpy as np

from penstock.workers.errors import IntegrityError
from penstock.workers.parallel.follower import Follower
from penstock.workers.parallel.leader import GroupLeader
from penstock.workers.scheduler.plan import U64


class LeaderSums:
    """See `OracleGroup`, on rank 0."""

    def __init__(self, leader: GroupLeader) -> None:
        self._leader = leader

    def add_up(self, sums: U64) -> U64:
        """The sums [S] of all ranks. Raises GroupError, IntegrityError."""
        leader = self._leader
        with leader.progress.waiting():
            parts = leader.sender.parts(leader.progress.begun)
        for rank, part in enumerate(parts, start=1):
            if len(part) != sums.nbytes:
                raise IntegrityError(f"rank {rank} gave {len(part)} bytes instead of {sums.nbytes}")
            sums = sums + np.frombuffer(part, np.uint64)
        return sums


class FollowerSums:
    """See `OracleGroup`, on ranks above 0."""

    def __init__(self, follower: Follower) -> None:
        self._follower = follower

    def add_up(self, sums: U64) -> U64:
        """Hand over this rank's. Raises GroupError."""
        with self._follower.progress.waiting():
            self._follower.receiver.answer(np.ascontiguousarray(sums).tobytes())
        return sums
