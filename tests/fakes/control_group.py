"""A kernel's control group with a limit, for processes that are to meet it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def control_group(controller: str, limit: str, value: int) -> Iterator[Path]:
    """The file to which a process's id is written to confine it. `limit`: the controller's file that gets the value."""
    group = Path(f"/sys/fs/cgroup/{controller}/penstock-test-{os.getpid()}")
    try:
        group.mkdir()
    except OSError:
        pytest.skip(f"no control group of {controller} can be made here")
    try:
        (group / limit).write_text(str(value))
        yield group / "cgroup.procs"
    finally:
        group.rmdir()
