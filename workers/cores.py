"""Keeps a worker's process on its own cores, so that two workers of one host do not compute in each other's caches.

Called by `process.py` and `actor.py` before anything of the worker exists: threads inherit the cores of who starts
them, so torch's, started by the first step, are bound as well. Does not know how cores were shared out.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

from penstock.workers.errors import ConfigError


def take_cores(cpus: Sequence[int]) -> None:
    """Bind every thread of this process to the cores `cpus`; none stated: leave them as they are.

    Raises ConfigError for a core that this process may not use.
    """
    if not cpus:
        return
    allowed = os.sched_getaffinity(0)
    missing = sorted(set(cpus) - allowed)
    if missing:
        raise ConfigError(
            f"core{'s' if len(missing) > 1 else ''} {', '.join(map(str, missing))} of {list(cpus)}: this process may "
            f"use {', '.join(map(str, sorted(allowed)))}",
            key="runner.cpus",
        )
    for thread in Path("/proc/self/task").iterdir():  # Linux keeps the cores per thread
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(int(thread.name), cpus)
