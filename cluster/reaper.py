"""`python -m penstock.cluster.reaper`: ends what a killed launcher leaves of its private Ray.

Started by `ray_runtime.py`, which writes one JSON line per process it has below it, its folder, and `done` at an
orderly end. When the pipe closes without that, the launcher was killed: most of Ray goes with it by itself, some of
its agents do not. Knows nothing but what it is told, and ends only processes that still are the ones it was told of.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import sys
from collections.abc import Iterable

import psutil

PATIENCE_S = 3.0  # for those that end by themselves


def main(lines: Iterable[str]) -> None:
    """Read until the launcher is done or gone."""
    processes: dict[int, psutil.Process] = {}
    folder = ""
    for line in lines:
        note = json.loads(line)
        if "done" in note:
            return
        folder = note.get("folder", folder)
        if "pid" in note:
            with contextlib.suppress(psutil.NoSuchProcess):
                process = psutil.Process(note["pid"])
                if process.create_time() == note["created"]:
                    processes[process.pid] = process
    _, alive = psutil.wait_procs(list(processes.values()), timeout=PATIENCE_S)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()  # psutil compares the creation time first
    psutil.wait_procs(alive, timeout=PATIENCE_S)
    if folder:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for the launcher
    main(sys.stdin)
