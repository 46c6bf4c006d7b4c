"""Equal on one host, different where /proc cannot be shared or read."""

from __future__ import annotations

import os
import subprocess
import sys

from penstock.workers.transfer.host import host_id


def test_other_processes_of_this_host_agree():
    code = "from penstock.workers.transfer.host import host_id; print(host_id())"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=30)
    assert other.stdout.strip() == host_id()


def test_another_namespace_differs(monkeypatch):
    ours = host_id()
    monkeypatch.setattr(os, "readlink", lambda path: f"{path}:[another]")
    assert host_id() != ours


def test_without_proc_nobody_is_equal(monkeypatch):
    def fail(path):
        raise OSError(2, "no /proc")

    monkeypatch.setattr(os, "readlink", fail)
    assert host_id() != host_id()
