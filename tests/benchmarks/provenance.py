"""Where and of what a benchmark's figures were taken; every committed result carries it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path


def provenance() -> dict[str, object]:
    """Device, versions and commit."""
    root = Path(__file__).parents[2]
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True, check=False
    )
    dirty = subprocess.run(
        ["git", "status", "--porcelain", "-uno"], cwd=root, capture_output=True, text=True, check=False
    )
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        "",
    )
    flags = Path("/proc/cpuinfo").read_text()
    versions = {name: importlib.metadata.version(name) for name in ("torch", "ray", "numpy", "grpcio")}
    return {
        "device": f"{os.cpu_count()} cores, {cpu}{', AVX-512' if 'avx512f' in flags else ''}",
        "versions": {"python": platform.python_version(), **versions},
        "commit": commit.stdout.strip() + ("+changes" if dirty.stdout.strip() else ""),
    }
