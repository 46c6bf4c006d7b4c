"""Two Ray nodes on loopback, as `ray start` makes them, and Serve's own command line against them."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml
from fakes.ports import free_ports

BIN = Path(sys.executable).parent
PENSTOCK = (sys.executable, "-c", "from penstock.cluster.cli import main; main()")
OBJECT_STORE_BYTES = 80 << 20


class TwoNodeRay:
    """A head and a second node, each with its own resources; token authentication is on."""

    def __init__(self, head: Mapping[str, float], second: Mapping[str, float], cpus: int = 4) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="penstock-two-", dir="/tmp"))  # short: it holds Unix sockets
        self.gcs_port, self.dashboard_port, self.http_port, self.direct_port, *agents = free_ports(7)
        self.address = f"127.0.0.1:{self.gcs_port}"
        self.url = f"http://127.0.0.1:{self.http_port}"
        self.environment = {
            **os.environ,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ADDRESS": self.address,
            "RAY_DASHBOARD_ADDRESS": f"http://127.0.0.1:{self.dashboard_port}",
            "RAY_SERVE_LOG_TO_STDERR": "0",
            **self.store(),
        }
        self._seen: dict[int, psutil.Process] = {}
        common = ["--node-ip-address=127.0.0.1", f"--num-cpus={cpus}", f"--object-store-memory={OBJECT_STORE_BYTES}"]
        common += ["--disable-usage-stats", "--include-log-monitor=false", "--block"]
        head_options = [
            "--head",
            f"--port={self.gcs_port}",
            f"--temp-dir={self.folder}",
            f"--resources={json.dumps(head)}",
        ]
        head_options += ["--dashboard-host=127.0.0.1", f"--dashboard-port={self.dashboard_port}"]
        head_options += [f"--ray-client-server-port={agents[0]}", f"--dashboard-agent-listen-port={agents[1]}"]
        self._nodes = [self._start("head", [*common, *head_options])]
        self.until(self._head_answers, 60.0)
        second_options = [f"--address={self.address}", f"--resources={json.dumps(second)}"]
        second_options += [f"--dashboard-agent-listen-port={agents[2]}"]
        self._second = [*common, *second_options]
        self.start_second()
        self.http = httpx.Client(base_url=self.url, trust_env=False, timeout=20.0)

    @property
    def head(self) -> subprocess.Popen[bytes]:
        """`ray start` of the head."""
        return self._nodes[0]

    def store(self) -> Mapping[str, str]:
        """Where Ray keeps its control data, as environment variables; nothing: in memory."""
        return {}

    def start_second(self) -> None:
        """Start the second node, again if it was killed."""
        self._nodes.append(self._start("second", self._second))

    def kill_second(self) -> None:
        """SIGKILL the second node and everything on it, as a power cut would."""
        self.see()
        node = self._nodes.pop()
        below = psutil.Process(node.pid).children(recursive=True)
        for process in [psutil.Process(node.pid), *below]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        node.wait(10)

    def serve(self, *arguments: str, timeout_s: float = 120.0) -> str:
        """`serve ...`; its output. RuntimeError when it fails."""
        done = subprocess.run(
            [BIN / "serve", *arguments],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            cwd=self.folder,
            check=False,
        )
        self.see()
        if done.returncode:
            raise RuntimeError(f"serve {' '.join(arguments)}: {done.stdout}{done.stderr}")
        return done.stdout

    def begin_penstock(self, *arguments: str) -> subprocess.Popen[bytes]:
        """`penstock ...` in the background; its output is in `penstock.log`."""
        with (self.folder / "penstock.log").open("wb") as log:
            return subprocess.Popen(
                [*PENSTOCK, *arguments], env=self.environment, stdout=log, stderr=log, start_new_session=True
            )

    def penstock(self, *arguments: str, timeout_s: float = 60.0) -> str:
        """`penstock ...`; its output. RuntimeError when it fails."""
        done = subprocess.run(
            [*PENSTOCK, *arguments],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"penstock {' '.join(arguments)}: {done.stdout}{done.stderr}")
        return done.stdout

    def deploy(self, config: Mapping[str, Any]) -> None:
        """`serve deploy` with a file of this content."""
        path = self.folder / f"deploy-{time.monotonic_ns()}.yaml"
        path.write_text(yaml.safe_dump(dict(config)))
        self.serve("deploy", str(path), "-a", self.environment["RAY_DASHBOARD_ADDRESS"])

    def shutdown_serve(self) -> None:
        """`serve shutdown`."""
        self.serve("shutdown", "-y", "-a", self.environment["RAY_DASHBOARD_ADDRESS"])

    def application(self, name: str) -> dict[str, Any]:
        """What `serve status` says about one application."""
        status = yaml.safe_load(self.serve("status", "-a", self.environment["RAY_DASHBOARD_ADDRESS"]))
        found: dict[str, Any] = status["applications"].get(name, {})
        return found

    def workers(self) -> dict[str, dict[str, Any]]:
        """`GET /status` by worker id; empty while nobody answers."""
        try:
            return {worker["id"]: worker for worker in self.http.get("/status").json()["workers"]}
        except (httpx.HTTPError, ValueError, KeyError):
            return {}

    def ready_roles(self) -> dict[str, int]:
        """Ready workers by role."""
        roles: dict[str, int] = {}
        for worker in self.workers().values():
            if worker["state"] == "ready":
                roles[worker["role"]] = roles.get(worker["role"], 0) + 1
        return roles

    def until(self, condition: Callable[[], Any], timeout_s: float) -> float:
        """Seconds until `condition()` held."""
        began = time.monotonic()
        while not condition():
            if time.monotonic() - began > timeout_s:
                raise TimeoutError(f"not within {timeout_s} s; logs in {self.folder}")
            time.sleep(0.1)
        return time.monotonic() - began

    def processes(self, *titles: str) -> list[psutil.Process]:
        """Live processes of this Ray whose title holds one of these."""
        return [process for process in self.see() if any(title in " ".join(command(process)) for title in titles)]

    def on_second(self, title: str) -> bool:
        """Whether a process of that title lives on the second node."""
        second = self._nodes[-1].pid
        return any(second in (parent.pid for parent in process.parents()) for process in self.processes(title))

    def see(self) -> list[psutil.Process]:
        """Live processes below the nodes."""
        for node in self._nodes:
            with contextlib.suppress(psutil.NoSuchProcess):
                for process in [psutil.Process(node.pid), *psutil.Process(node.pid).children(recursive=True)]:
                    self._seen.setdefault(process.pid, process)
        return [process for process in self._seen.values() if process.is_running() and command(process)]

    def logs(self, *names: str) -> str:
        """The ends of the logs whose file name holds one of these, for a failing test."""
        found = [
            f"=== {path.name}\n{path.read_text(errors='replace')[-3000:]}"
            for path in sorted((self.folder / "session_latest" / "logs").rglob("*"))
            if path.is_file() and any(name in path.name for name in names) and path.stat().st_size
        ]
        return "\n".join(found)

    def end(self) -> None:
        """End both nodes and everything below them."""
        self.http.close()
        self.see()
        for node in reversed(self._nodes):
            node.terminate()
        for node in self._nodes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                node.wait(15)
        for process in self.see():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(list(self._seen.values()), timeout=10)
        for node in self._nodes:
            node.wait(5)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start(self, name: str, options: list[str]) -> subprocess.Popen[bytes]:
        environment = {key: value for key, value in self.environment.items() if key != "RAY_ADDRESS"}
        with (self.folder / f"{name}.log").open("wb") as log:
            return subprocess.Popen(
                [BIN / "ray", "start", *options],
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                cwd=self.folder,
            )

    def _head_answers(self) -> bool:
        if self._nodes[0].poll() is not None:
            raise RuntimeError((self.folder / "head.log").read_text())
        headers = {"authorization": f"Bearer {self.environment['RAY_AUTH_TOKEN']}"}
        with contextlib.suppress(httpx.HTTPError):
            answer = httpx.get(f"http://127.0.0.1:{self.dashboard_port}/api/version", headers=headers, trust_env=False)
            return answer.status_code == 200
        return False


def command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []
