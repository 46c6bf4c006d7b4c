"""The priority of this process among those of its node."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def take_normal_priority() -> None:
    """Undo the low priority that Ray gives to actors: Penstock's are who serves.

    Whatever computes beside them on a node whose cores are full would leave them next to nothing; Ray's own dashboard
    does while the control store is away. Needs the right to, and goes on without: Ray can be started with
    RAY_worker_niceness=0 instead.
    """
    with contextlib.suppress(PermissionError, ProcessLookupError):
        for thread in Path("/proc/self/task").iterdir():  # Linux keeps a priority per thread
            if os.getpriority(os.PRIO_PROCESS, int(thread.name)) > 0:
                os.setpriority(os.PRIO_PROCESS, int(thread.name), 0)
