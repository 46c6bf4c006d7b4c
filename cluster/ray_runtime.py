"""Ray for one Penstock cluster: starts a private head on this machine or joins one, and leaves nothing behind.

`launch.py` uses it. A private head runs without dashboard and usage reports, keeps its files in a folder of its own,
and dies with this process even on SIGKILL: the kernel ends Ray's servers with their parent, `reaper.py` the rest.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import ray

from penstock.cluster.config import export_environment
from penstock.workers.errors import ConfigError

log = logging.getLogger(__name__)

RAY_SWITCHES = {
    "RAY_USAGE_STATS_ENABLED": "0",  # no reports to anybody
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # leave device variables of actors without GPUs alone
    "RAY_SERVE_LOG_TO_STDERR": "0",
    "RAY_worker_niceness": "0",  # Ray would give actors a low priority, and they are who serves
    "GRPC_VERBOSITY": "ERROR",  # a stream that ends is no news for a terminal
    "GOMP_SPINCOUNT": "30000",  # idle compute threads spin briefly, then leave the cores to ingress and RPC
    "OPENBLAS_NUM_THREADS": "1",  # numpy computes nothing large, and would start a thread per core in every process
}
OBJECT_STORE_BYTES = 80 << 20  # Ray's least; no request data passes through it
CONNECT_TIMEOUT_S = 5.0
FOLDER_PREFIX = "penstock-"
RAY_FOLDER = "ray"  # of its own: Ray opens its folder to everybody
ACCESS_FILE = "access.json"
END_TIMEOUT_S = 10.0


@functools.cache
def private_access() -> dict[str, str]:
    """A token that only processes below this one inherit: Ray listens on every interface and asks for it by default.

    One per process, because Ray reads it once.
    """
    return {"RAY_AUTH_TOKEN": secrets.token_hex(32)}


def check_answers(address: str) -> None:
    """Raises ConfigError when nobody listens at host:port; Ray itself would try for more than a minute."""
    host, separator, port = address.removeprefix("ray://").rpartition(":")
    if not separator or not port.isdigit():
        return  # "auto", or a form that Ray may know
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise ConfigError(f"no Ray cluster at {address}: {error.strerror or error}", key="ray.address") from error


@contextlib.contextmanager
def join_running(address: str) -> Iterator[None]:
    """Be connected to a Ray that runs: at `address`, else to this user's own private head, else where Ray finds one.

    Raises ConfigError when there is none, or when several private heads run.
    """
    heads = [] if address else _private_heads()
    if len(heads) > 1:
        known = ", ".join(head["address"] for head in heads)
        raise ConfigError(f"several clusters run on this machine, name one of {known}", key="--address")
    if heads:
        export_environment({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": heads[0]["RAY_AUTH_TOKEN"]})
    runtime = RayRuntime(address or (heads[0]["address"] if heads else "auto"))
    runtime.start(0)
    try:
        yield
    finally:
        runtime.stop(keep_logs=False)


def _private_heads() -> list[dict[str, str]]:
    """Heads that a `penstock serve` of this user runs here, as their access files say; dead ones are skipped."""
    heads = []
    for path in Path(tempfile.gettempdir()).glob(f"{FOLDER_PREFIX}*/{ACCESS_FILE}"):
        with contextlib.suppress(OSError, ValueError, KeyError, ConfigError):
            if path.stat().st_uid == os.getuid():
                head = json.loads(path.read_text())
                check_answers(head["address"])
                heads.append({"address": str(head["address"]), "RAY_AUTH_TOKEN": str(head["RAY_AUTH_TOKEN"])})
    return heads


class RayRuntime:
    """This process's connection to Ray."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.private = not address
        self._folder: Path | None = None
        self._processes: dict[int, psutil.Process] = {}
        self._reaper: subprocess.Popen[str] | None = None

    def start(self, num_cpus: int) -> None:
        """Start a head with so many logical processors, or join. ConfigError when there is no Ray at the address."""
        handler = signal.getsignal(signal.SIGTERM)
        export_environment({**RAY_SWITCHES, **(private_access() if self.private else {})})
        for name in ("ray", "ray.serve"):
            logging.getLogger(name).setLevel(logging.ERROR)
        if self.private:
            self._start_head(num_cpus)
        else:
            self._join()
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)  # Ray puts in its own, which would skip our way down

    def _join(self) -> None:
        check_answers(self.address)
        try:
            ray.init(address=self.address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, ValueError, RuntimeError) as error:
            hint = "where it asks for a token, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN or ~/.ray/auth_token"
            message = f"cannot join the Ray cluster at {self.address}: {error}; {hint}"
            raise ConfigError(message, key="ray.address") from error

    def _start_head(self, num_cpus: int) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix=FOLDER_PREFIX))
        self._reaper = subprocess.Popen(
            [sys.executable, "-m", "penstock.cluster.reaper"], stdin=subprocess.PIPE, text=True, start_new_session=True
        )
        self._note({"folder": str(self._folder)})
        ray.init(
            address="local",
            num_cpus=num_cpus,
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            log_to_driver=False,
            logging_level=logging.ERROR,
            _temp_dir=str(self._folder / RAY_FOLDER),
        )
        # For commands of the same user on this machine; the folder is readable by nobody else, and goes with the head.
        access = {"address": ray.get_runtime_context().gcs_address, **private_access()}
        (self._folder / ACCESS_FILE).write_text(json.dumps(access))
        self.remember_processes()

    @property
    def log_folder(self) -> Path | None:
        """Where a private head's processes write their logs."""
        return self._folder / RAY_FOLDER / "session_latest" / "logs" if self._folder is not None else None

    def remember_processes(self) -> None:
        """Note what runs below this process now, so that its end can be made sure of, even if we are killed."""
        if self._reaper is None:
            return
        for process in psutil.Process().children(recursive=True):
            if process.pid not in self._processes and process.pid != self._reaper.pid:
                self._processes[process.pid] = process
                self._note({"pid": process.pid, "created": process.create_time()})

    def stop(self, keep_logs: bool) -> None:
        """Disconnect; a private head ends with all its processes, and its folder goes unless the logs are wanted."""
        self.remember_processes()
        ray.shutdown()
        _, alive = psutil.wait_procs(list(self._processes.values()), timeout=END_TIMEOUT_S)
        for process in alive:
            log.warning("process %d outlived Ray; killing it", process.pid)
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(alive, timeout=END_TIMEOUT_S)
        if self._folder is not None and not keep_logs:
            shutil.rmtree(self._folder, ignore_errors=True)
        if self._reaper is not None:
            self._note({"done": True})
            self._reaper.communicate()

    def _note(self, note: dict[str, object]) -> None:
        """Tell the reaper. It is a safeguard: that it has died is no reason to stop serving."""
        if self._reaper is not None and self._reaper.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._reaper.stdin.write(json.dumps(note) + "\n")
                self._reaper.stdin.flush()
