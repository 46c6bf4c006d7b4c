"""schemathesis against the whole front: from our own OpenAPI document, valid and invalid bodies, NUL bytes included.

Over a real socket, from another process, to a split cluster of oracle workers; a canary streams beside it. What is
asked: no server error, no answer that the document does not know, nothing accepted that it forbids, and a canary that
notices nothing. Left out is the check that everything the schema allows is accepted: rules between fields (`min_tokens`
against `max_tokens`) are beyond a schema.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fakes.http_server import HttpServer
from fakes.oracle_app import Canary, OracleApp

from penstock.cluster.ingress.http_protocol import guarded_protocol
from penstock.cluster.settings import LimitSettings
from penstock.cluster.text import TextCodec

KEY = "k-123"
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
    "unsupported_method",
    "ignored_auth",
)


@pytest.fixture
def app(codec: TextCodec) -> OracleApp:
    return OracleApp(codec, api_key=KEY, enable_tokenizer_info=True)


@pytest.fixture
def server(app: OracleApp) -> Iterator[HttpServer]:
    with HttpServer(app, guarded_protocol(LimitSettings()), graceful=True) as running:
        yield running


def fuzz(server: HttpServer, app: OracleApp, seconds: int, workdir: Path, *options: str) -> str:
    """Run for so long; what schemathesis printed. Asserts that canary and workers are well in the end."""
    canary = Canary(server.url, KEY)
    canary.start()
    canary.sang()
    command = [
        *(sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json"),
        *("--header", f"Authorization: Bearer {KEY}", "--phases", "coverage,fuzzing", "--mode", "all"),
        *("--checks", ",".join(CHECKS), "--max-time", str(seconds), "--continue-on-failure"),
        *("--generation-database", "none", "--request-timeout", "20"),
        *options,
    ]
    done = subprocess.run(command, cwd=workdir, capture_output=True, text=True, timeout=seconds + 60, check=False)
    canary.sang()
    canary.end()
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    deadline = time.monotonic() + 10
    while not app.idle and time.monotonic() < deadline:
        time.sleep(0.01)
    assert app.idle, "something still runs"
    print(done.stdout[-700:], f"canary rounds {canary.rounds}")
    return done.stdout


@pytest.mark.timeout(110)
def test_some_seconds_of_fuzzing(server: HttpServer, app: OracleApp, tmp_path: Path) -> None:
    printed = fuzz(server, app, 12, tmp_path, "--seed", "1")  # the same cases every time; the long run draws others
    assert "Coverage" in printed
    assert "Fuzzing" in printed


@pytest.mark.slow
@pytest.mark.timeout(720)
def test_ten_minutes_of_fuzzing(server: HttpServer, app: OracleApp, tmp_path: Path) -> None:
    fuzz(server, app, 600, tmp_path)
