"""The end of ranks, of one or of a whole group: their exit codes, and the killing of those that cannot end themselves.

`leader.py` and `follower.py` use it. A stopped or stuck process does not hear that it should end, so who notices ends
it, where both are on one host; a rank on another host is its host's to end. Pids are held as descriptors from the
meeting on, so that no other process can be hit in their place.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import time
from collections.abc import Sequence

EXIT_GROUP_LOST = 5  # another rank of the group is at fault, or the others have gone on without this one
EXIT_RANK_STUCK = 6  # this rank is

log = logging.getLogger(__name__)

_POLL_MS = 10


class RankProcess:
    """One rank's process on this host."""

    def __init__(self, rank: int, pid: int) -> None:
        self.rank = rank
        self.pid = pid
        self._descriptor: int | None = None
        with contextlib.suppress(OSError):
            self._descriptor = os.pidfd_open(pid)

    @property
    def held(self) -> bool:
        """It can be ended from here."""
        return self._descriptor is not None

    @property
    def gone(self) -> bool:
        """It has ended."""
        return self._descriptor is None or bool(_ended(self._descriptor))

    def kill(self) -> None:
        """End it, whatever it does."""
        if self._descriptor is not None:
            with contextlib.suppress(OSError):
                signal.pidfd_send_signal(self._descriptor, signal.SIGKILL)

    def close(self) -> None:
        """Let go of it."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def end_ranks(processes: Sequence[RankProcess], culprit: int | None, grace_s: float) -> None:
    """Kill the culprit, give the others `grace_s` to end by themselves, and kill who is left."""
    for process in processes:
        if process.rank == culprit and not process.gone:
            log.error("ending rank %d, process %d", process.rank, process.pid)
            process.kill()
    give_up = time.monotonic() + grace_s
    while time.monotonic() < give_up and not all(process.gone for process in processes):
        time.sleep(_POLL_MS / 1000)
    for process in processes:
        if not process.gone:
            log.error("rank %d, process %d, did not end by itself", process.rank, process.pid)
            process.kill()


def _ended(descriptor: int) -> bool:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(0))
