"""A worker process keeps to its cores, and says which of them it does not have."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from fakes.worker_process import VOCAB, WorkerProcess, oracle_settings

from penstock.workers.cores import take_cores
from penstock.workers.errors import ConfigError
from penstock.workers.settings import RunnerSettings


@pytest.fixture
def allowed() -> Iterator[set[int]]:
    before = os.sched_getaffinity(0)
    yield before
    for thread in Path("/proc/self/task").iterdir():
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(int(thread.name), before)


def test_every_thread_that_runs_and_every_one_to_come_is_bound(allowed: set[int]) -> None:
    core, over, found = min(allowed), threading.Event(), []
    running = threading.Thread(target=over.wait)
    running.start()
    take_cores([core])
    later = threading.Thread(target=lambda: found.append(os.sched_getaffinity(0)))
    later.start()
    later.join()
    bound = os.sched_getaffinity(running.native_id or 0)
    over.set()
    running.join()
    assert (bound, found) == ({core}, [{core}])


def test_no_cores_stated_leaves_things_as_they_are(allowed: set[int]) -> None:
    take_cores(())
    assert os.sched_getaffinity(0) == allowed


def test_a_core_that_is_not_there_is_named(allowed: set[int]) -> None:
    with pytest.raises(ConfigError, match="core 4095 of") as caught:
        take_cores([min(allowed), 4095])
    assert caught.value.key == "runner.cpus"
    assert os.sched_getaffinity(0) == allowed, "nothing was changed"


@pytest.mark.timeout(60)
def test_a_process_takes_its_cores(allowed: set[int]) -> None:
    core = max(allowed)
    runner = RunnerSettings(kind="oracle", oracle_vocab=VOCAB, cpus=(core,))
    with WorkerProcess(oracle_settings(runner=runner)) as worker:
        for thread in psutil.Process(worker.process.pid).threads():
            assert os.sched_getaffinity(thread.id) == {core}
