"""The reaper: it ends what it was told of when its launcher is gone without a word, and nothing else."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

pytestmark = pytest.mark.timeout(30)


@pytest.fixture
def sleepers() -> Iterator[list[subprocess.Popen]]:
    processes = [subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) for _ in range(2)]
    yield processes
    for process in processes:
        process.kill()
        process.wait(5)


def note(process: subprocess.Popen, off_s: float = 0.0) -> dict:
    return {"pid": process.pid, "created": psutil.Process(process.pid).create_time() + off_s}


def reap(*notes: dict) -> None:
    lines = "".join(json.dumps(one) + "\n" for one in notes)
    subprocess.run([sys.executable, "-m", "penstock.cluster.reaper"], input=lines, text=True, check=True, timeout=20)


def test_a_launcher_that_vanishes_is_cleaned_up_after(sleepers: list[subprocess.Popen], tmp_path: Path) -> None:
    folder = tmp_path / "ray"
    (folder / "logs").mkdir(parents=True)
    ours, pid_of_somebody_else = sleepers
    reap(
        {"folder": str(folder)},
        note(ours),
        note(pid_of_somebody_else, off_s=-100.0),
        {"pid": 1 << 30, "created": 0.0},
    )
    assert ours.wait(5) == -9
    assert pid_of_somebody_else.poll() is None
    assert not folder.exists()


def test_an_orderly_end_leaves_everything_alone(sleepers: list[subprocess.Popen], tmp_path: Path) -> None:
    reap({"folder": str(tmp_path)}, note(sleepers[0]), {"done": True})
    assert sleepers[0].poll() is None
    assert tmp_path.exists()
