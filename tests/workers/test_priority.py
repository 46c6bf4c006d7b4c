"""A process with a low priority takes the normal one, with every thread it has, or goes on without the right to."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SCRIPT = """
import os, threading
from penstock.workers.priority import take_normal_priority
os.nice(10)  # of this thread, and of those that it starts
begun, end = threading.Event(), threading.Event()
thread = threading.Thread(target=lambda: (begun.set(), end.wait()))
thread.start()
begun.wait()
{before}
take_normal_priority()
print(os.getpriority(os.PRIO_PROCESS, 0), os.getpriority(os.PRIO_PROCESS, thread.native_id))
end.set()
"""


def priorities(before: str = "") -> str:
    command = [sys.executable, "-c", SCRIPT.format(before=before)]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.strip()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may raise a priority")
def test_every_thread_takes_the_normal_priority() -> None:
    assert priorities() == "0 0"


def test_without_the_right_to_it_goes_on_as_it_is() -> None:
    give_up_rights = "os.setuid(65534)" if os.geteuid() == 0 else ""
    assert priorities(give_up_rights) == "10 10"
