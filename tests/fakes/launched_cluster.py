"""A whole cluster on a private Ray, launched by a process of its own as `penstock serve` does, for tests over HTTP."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import psutil
from fakes.ports import free_port

LAUNCH = """
import json, logging, sys
from penstock.cluster.config import load_config
from penstock.cluster.launch import serve
from penstock.workers.errors import PenstockError

logging.basicConfig(level=logging.WARNING)
try:
    serve(load_config(values=json.loads(sys.argv[1])))
except PenstockError as error:
    print(f"{type(error).__name__}: {error}")
    sys.exit(2)
"""


class LaunchedCluster:
    """`values` are dotted configuration keys. Nothing of it survives `end`."""

    def __init__(self, folder: Path, values: Mapping[str, Any]) -> None:
        self.port = int(values.get("front.port") or free_port())
        scheme = "https" if values.get("tls.cert_file") else "http"
        self.url = f"{scheme}://127.0.0.1:{self.port}"
        self.log = folder / "launch.log"
        self._see_nothing_yet()
        stated = {"front.admin": "shared", **values, "front.port": self.port}
        self.admin_url = f"{scheme}://127.0.0.1:{stated.get('front.admin_port', self.port)}"
        command = [sys.executable, "-c", LAUNCH, json.dumps(stated)]
        with self.log.open("wb") as log:
            # A session of its own, so that a Ctrl-C at the test run's terminal does not reach it twice.
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        known = ssl.create_default_context(cafile=values.get("tls.ca_file"))
        self.http = httpx.Client(base_url=self.url, trust_env=False, timeout=20.0, verify=known)

    def wait_ready(self, timeout_s: float = 60.0) -> None:
        self.until(self.ready, timeout_s)
        self.see()

    def ready(self) -> bool:
        if self.process.poll() is not None:
            raise RuntimeError(f"the launcher ended with {self.process.returncode}: {self.log.read_text()}")
        try:
            return self.http.get("/ready").status_code == 200
        except httpx.HTTPError:
            return False

    def until(self, condition: Callable[[], bool], timeout_s: float) -> float:
        """Seconds until `condition()` held."""
        began = time.monotonic()
        while not condition():
            if time.monotonic() - began > timeout_s:
                raise TimeoutError(f"not within {timeout_s} s: {self.log.read_text()[-2000:]}")
            time.sleep(0.05)
        return time.monotonic() - began

    def workers(self) -> dict[str, dict[str, Any]]:
        return {worker["id"]: worker for worker in self.http.get(f"{self.admin_url}/status").json()["workers"]}

    def actor(self, title: str) -> psutil.Process:
        """The one live process of this cluster whose Ray title begins so."""
        (found,) = [p for p in self.see() if title in " ".join(_command(p))]
        return found

    def _see_nothing_yet(self) -> None:
        self._seen: dict[int, psutil.Process] = {}
        self._folders: set[Path] = set()

    def see(self) -> list[psutil.Process]:
        """Live processes below the launcher; all ever seen must be gone at the end."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in psutil.Process(self.process.pid).children(recursive=True):
                if self._seen.setdefault(process.pid, process) is process:
                    self._folders.update(_private_folders(process))
        return [process for process in self._seen.values() if process.is_running() and _command(process)]

    def stream(self, **body: Any) -> Iterator[dict[str, Any]]:
        """Events of a streamed completion. RuntimeError for an error event; httpx errors for a broken connection."""
        request = {"stream": True, "return_token_ids": True, **body}
        with self.http.stream("POST", "/v1/completions", json=request) as answer:
            if answer.status_code != 200:
                raise RuntimeError(answer.read().decode())
            for line in answer.iter_lines():
                if line == "data: [DONE]":
                    return
                if line.startswith("data: "):
                    event = json.loads(line[6:])
                    if "error" in event:
                        raise RuntimeError(json.dumps(event["error"]))
                    yield event
        raise RuntimeError("the stream ended without [DONE]")

    def terminate(self, timeout_s: float = 30.0) -> int:
        """SIGTERM to the launcher; its exit code."""
        self.see()
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout_s)

    def survivors(self, within_s: float) -> list[str]:
        """Processes of this cluster that still live after so long."""
        _, alive = psutil.wait_procs(list(self._seen.values()), timeout=within_s)
        return [" ".join(_command(p))[:120] for p in alive]

    def end(self) -> None:
        """Kill whatever is left, on the way out of a failed test."""
        self.http.close()
        self.see()
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(10)
        for process in self.see():
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
        for folder in self._folders:  # left where a start failed, for its logs, or where the reaper was killed above
            shutil.rmtree(folder, ignore_errors=True)


def _private_folders(process: psutil.Process) -> set[Path]:
    """Of a private Ray's process: the folder that goes with it."""
    sessions = [Path(part.partition("=")[2]) for part in _command(process) if part.startswith("--session-dir=")]
    return {session.parent.parent for session in sessions if session.parent.parent.name.startswith("penstock-")}


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []


def tokens_of(events: list[dict[str, Any]]) -> list[int]:
    return [token for event in events for choice in event["choices"] for token in choice.get("token_ids") or []]
