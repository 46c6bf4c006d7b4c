"""What the host must allow a process, checked before it builds anything: a limit met later is a crash, or a hang.

`process.py` and `actor.py` ask for what a worker or a rank of it needs, `cluster/launch.py` for what a private Ray
needs. With too few open files or threads gRPC and Ray have been seen to end the process without a word, or to wait.
"""

from __future__ import annotations

import os
import resource
import threading

from penstock.workers.errors import ConfigError

LEAST_OPEN_FILES = 256  # some tens at rest; every router and every peer that sends KV adds to them
_WANTED_OPEN_FILES = 1 << 16
LEAST_THREADS = 64 + (os.cpu_count() or 1)  # 14 at rest on two cores; gRPC and torch take more where there are more


def take_limits(worker_id: str) -> None:
    """Have what a worker's process needs. Raises ConfigError that names the limit which is too low."""
    _take_open_files()
    require_threads(LEAST_THREADS, f"worker {worker_id}")


def require_threads(count: int, who: str) -> None:
    """Raises ConfigError unless so many can be started now.

    Tried, not computed: limits per user, per control group and of the kernel all bind, and others' threads count.
    """
    release = threading.Event()
    started: list[threading.Thread] = []
    try:
        for _ in range(count):
            thread = threading.Thread(target=release.wait, daemon=True)
            thread.start()
            started.append(thread)
    except RuntimeError as error:
        raise ConfigError(
            f"{len(started)} more threads can be started here and {who} needs {count}; raise the limit on processes "
            "and threads (ulimit -u, TasksMax, --pids-limit, podPidsLimit)",
            key="RLIMIT_NPROC",
        ) from error
    finally:
        release.set()
        for thread in started:
            thread.join()


def _take_open_files() -> None:
    """As many as this process may have, and can use. Raises ConfigError where those are too few."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _WANTED_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _WANTED_OPEN_FILES)
    if most < LEAST_OPEN_FILES:
        raise ConfigError(
            f"this process may open {hard} files and a worker needs {LEAST_OPEN_FILES}; raise the limit "
            "(ulimit -n, LimitNOFILE, --ulimit nofile)",
            key="RLIMIT_NOFILE",
        )
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
