"""Penstock as an application on a Ray with Serve, deployed by a driver of its own that has Serve's gRPC proxy too.

The driver is what a user's own program or a Ray job is: it deploys with `serve.run`, looks the cluster up with
`connect()` from itself and from a Ray task, and prints what it found. Nothing of it survives `end`.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
from fakes.launched_cluster import LaunchedCluster
from fakes.ports import free_port

DRIVER = """
import json, sys, warnings
warnings.simplefilter("ignore")
import ray
from ray import serve
from penstock.cluster.client import connect
from penstock.cluster.serve_app import build

given = json.loads(sys.argv[1])
context = ray.init(
    address="local", num_cpus=4, include_dashboard=False, object_store_memory=80 << 20, log_to_driver=False,
    _node_ip_address="127.0.0.1", _temp_dir=given["folder"],
)
functions = ["penstock.cluster.grpc_front.rpcs.add_GenerationServicer_to_server"]
serve.start(
    http_options={"host": "127.0.0.1", "port": given["http_port"]},
    grpc_options={"port": given["proxy_port"], "grpc_servicer_functions": functions, "enable_reflection": True},
    logging_config={"enable_access_log": False, "log_level": "WARNING"},
)
serve.run(build(given["arguments"]), name="front", route_prefix="/")

@ray.remote(num_cpus=0)
def tokens():
    return connect().generate([1, 2, 3], max_tokens=4, temperature=0).token_ids

facts = {
    "ray_address": context.address_info["gcs_address"],
    "driver": connect().url,
    "named": connect(cluster="front").url,
    "task": ray.get(tokens.remote()),
}
print(json.dumps(facts), flush=True)
sys.stdin.read()
"""


class ServeApplication(LaunchedCluster):
    """`arguments` are those of `penstock.cluster.serve_app:build`. `facts` is what the driver found."""

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="penstock-app-", dir="/tmp"))  # short: it holds Unix sockets
        self.port, self.proxy_port = free_port(), free_port()
        self.url = self.admin_url = f"http://127.0.0.1:{self.port}"
        self.log = self.folder / "driver.log"
        self.facts: dict[str, Any] = {}
        self._see_nothing_yet()
        self.environment = {
            **os.environ,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_SERVE_LOG_TO_STDERR": "0",
        }
        given = {
            "folder": str(self.folder / "ray"),
            "http_port": self.port,
            "proxy_port": self.proxy_port,
            "arguments": {**arguments, "front": {"admin": "shared", **arguments.get("front", {})}},
        }
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", DRIVER, json.dumps(given)],
                env=self.environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
            )
        self.http = httpx.Client(base_url=self.url, trust_env=False, timeout=20.0)

    def wait_ready(self, timeout_s: float = 90.0) -> None:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()  # the test's own time-out bounds it
        if not line:
            raise RuntimeError(f"the driver ended: {self.log.read_text()[-3000:]}")
        self.facts = json.loads(line)
        super().wait_ready(timeout_s)

    def job(self, code: str, **environment: str) -> str:
        """What a program prints that runs beside the Ray cluster as a submitted job does."""
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**self.environment, "RAY_ADDRESS": self.facts["ray_address"], **environment},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(done.stdout + done.stderr)
        return done.stdout.strip()

    def end(self) -> None:
        self.see()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()
        super().end()
        shutil.rmtree(self.folder, ignore_errors=True)
