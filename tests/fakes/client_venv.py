"""Virtual environments of clients that nobody wants beside Penstock: one per list of pinned versions, made once.

They live outside of the checkout, in $PENSTOCK_CLIENT_VENVS or below the system's folder for temporary files. What a
client needs is listed whole in `tests/clients/requirements-<name>.txt`, so nothing is resolved when it is installed.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

REQUIREMENTS = Path(__file__).resolve().parents[1] / "clients"
INSTALL_TIMEOUT_S = 900


def client_bin(name: str) -> Path:
    """The `bin` folder of the client's environment. AssertionError with pip's words when it cannot be made."""
    requirements = REQUIREMENTS / f"requirements-{name}.txt"
    content = requirements.read_text() + sys.version
    root = Path(os.environ.get("PENSTOCK_CLIENT_VENVS") or Path(tempfile.gettempdir()) / "penstock-client-venvs")
    root.mkdir(parents=True, exist_ok=True)
    venv = root / f"{name}-{hashlib.sha256(content.encode()).hexdigest()[:16]}"
    finished = venv / "finished"
    with (root / f"{venv.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not finished.exists():
            shutil.rmtree(venv, ignore_errors=True)
            _run([sys.executable, "-m", "venv", str(venv)])
            _run([str(venv / "bin" / "pip"), "install", "-q", "--no-deps", "-r", str(requirements)])
            finished.touch()
    return venv / "bin"


def run_client(command: Sequence[str | Path], folder: Path, **environment: str) -> str:
    """What the client prints. It finds no hub, no proxy and nothing of ours in its environment."""
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder), "NO_PROXY": "127.0.0.1"}
    plain = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        env={**plain, **offline, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_TIMEOUT_S, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr[-3000:]}"
