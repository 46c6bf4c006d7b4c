"""`python -m penstock.workers.process`: one worker as a plain process, with neither Ray nor torch unless it needs it.

Started by `cluster/local.py` and tests. The settings (`WorkerSettings.to_json`, one line) come on stdin; one JSON line
goes out on stdout when the worker serves: `{"address": "host:port", "pid": ..., ...}`, or `{"error": ...}` when it
cannot. Logs go to stderr. SIGTERM or SIGINT drains and exits 0; a second one exits at once. Exit codes: 1 it could not
start, 3 its engine failed. It ends by itself when the process named `parent_pid` ends, however that one died.

K such processes form a group when their settings say so, alike but for `group.rank`. Rank 0 first says where the others
find it, `{"group_address": "host:port"}`, which is their `group.leader`, and gives its usual line when all have loaded;
they say `{"joined": true, "pid": ...}` then, and end with rank 0. Further exit codes of a group: 5 another rank is at
fault, 6 this one is.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import select
import signal
import sys
import threading
import time
from types import FrameType
from typing import TextIO

from penstock.workers import fault_points
from penstock.workers.assembly import Worker, build_worker
from penstock.workers.cores import take_cores
from penstock.workers.errors import PenstockError
from penstock.workers.fault_points import Point
from penstock.workers.group_assembly import build_follower
from penstock.workers.logs import configure
from penstock.workers.parallel.follower import Follower
from penstock.workers.parallel.leader import GroupLeader
from penstock.workers.process_limits import take_limits
from penstock.workers.settings import WorkerSettings

log = logging.getLogger(__name__)

EXIT_STARTED_NOT, EXIT_ENGINE_FAILED, EXIT_ORPHANED = 1, 3, 4
# Three threads share the interpreter: one that has work for a few microseconds must not wait the default 5 ms for it.
SWITCH_INTERVAL_S = 0.0005
_LEADER_MARGIN_S = 10.0  # rank 0's end takes this much longer than its drain
_LOOK_EVERY_S = 0.05  # a failed engine is noticed within


def main() -> int:
    """Run one worker, or one rank of it, until it is told to end; the exit code."""
    leader: GroupLeader | None = None
    try:
        settings = WorkerSettings.from_json(sys.stdin.readline())
        _begin(settings)
        settings.group.check()
        if settings.group.rank:
            return _follow(settings)
        if settings.group.width > 1:
            leader = _lead(settings)
        worker = build_worker(settings, leader)
        worker.start()
    except (PenstockError, OSError, ValueError) as error:
        _say_why(error)
        if leader is not None:
            leader.abandon_start(error)
        return EXIT_STARTED_NOT
    stop = _catch_signals()
    _say(sys.stdout, {"address": worker.address, **dataclasses.asdict(worker.facts)})
    return _serve(worker, settings, stop)


def _lead(settings: WorkerSettings) -> GroupLeader:
    """Listen for the other ranks, and say where. Raises ConfigError."""
    leader = GroupLeader(settings)
    leader.on_start_failure = _leave_start
    _say(sys.stdout, {"group_address": leader.address})
    return leader


def _follow(settings: WorkerSettings) -> int:
    """Be a rank above 0 until rank 0 ends; the exit code. Raises ConfigError, GroupError while it has not joined."""
    follower = Follower(settings)
    follower.on_start_failure = _leave_start
    try:
        parts = build_follower(settings, follower)
    except (PenstockError, OSError, ValueError) as error:
        follower.abandon_start(error)
        raise
    stop = _catch_signals()
    facts = {"joined": True, "pid": os.getpid(), "rank": settings.group.rank}
    _say(sys.stdout, {**facts, "weights_address": parts.weights_address})
    threading.Thread(target=_end_without_leader, args=(stop, settings), name="stop", daemon=True).start()
    code = follower.serve(parts)
    parts.transfer.stop()
    return code


def _end_without_leader(stop: threading.Event, settings: WorkerSettings) -> None:
    """A rank that is told to end waits for rank 0, which drains, but not for ever."""
    stop.wait()
    time.sleep(settings.drain_s + _LEADER_MARGIN_S)
    log.warning("rank 0 has not ended the group; rank %d ends", settings.group.rank)
    os._exit(0)


def _leave_start(error: Exception) -> None:
    """A rank of this group cannot start: this process may be anywhere in its own start, and ends."""
    _say_why(error)
    os._exit(EXIT_STARTED_NOT)


def _say_why(error: Exception) -> None:
    _say(sys.stdout, {"error": type(error).__name__, "message": str(error), "key": getattr(error, "key", None)})


def _begin(settings: WorkerSettings) -> None:
    configure(settings.logs, settings.title)
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    if fault_points.plan is not None:
        fault_points.plan.reach(Point.WORKER_START, settings.worker_id)
    take_limits(settings.title)
    take_cores(settings.runner.cpus)
    if settings.parent_pid:
        watch_parent(settings.parent_pid)


def watch_parent(pid: int) -> None:
    """End this process as soon as `pid` ends.

    A pidfd and not PR_SET_PDEATHSIG, because that fires when the *thread* that forked us ends, and parents fork from
    short-lived threads.
    """
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        os._exit(EXIT_ORPHANED)

    def wait() -> None:
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        poll.poll()
        log.warning("process %d, which started this worker, is gone; the worker ends", pid)
        os._exit(EXIT_ORPHANED)  # nobody is left to whom an orderly end would matter, and streams break by it

    threading.Thread(target=wait, name="parent-watch", daemon=True).start()


def _catch_signals() -> threading.Event:
    """Set by the first SIGTERM or SIGINT; the second ends the process at once."""
    stop = threading.Event()

    def on_signal(_: int, __: FrameType | None) -> None:
        if stop.is_set():
            os._exit(0)
        stop.set()

    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)
    return stop


def _serve(worker: Worker, settings: WorkerSettings, stop: threading.Event) -> int:
    while not worker.join(0) and not stop.wait(_LOOK_EVERY_S):
        pass
    if not worker.failed:
        log.info("draining for at most %.0f s", settings.drain_s)
        worker.stop(settings.drain_s)
    else:
        worker.stop()
    return EXIT_ENGINE_FAILED if worker.failed else 0


def _say(stream: TextIO, facts: dict[str, object]) -> None:
    stream.write(json.dumps(facts) + "\n")
    stream.flush()


if __name__ == "__main__":
    sys.exit(main())
