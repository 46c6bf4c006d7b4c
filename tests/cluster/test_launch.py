"""A cluster on a private Ray from start to end: it answers, its parts are killed one after the other, it goes away."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from fakes.launched_cluster import LaunchedCluster, tokens_of
from fakes.ports import free_port

from penstock.workers.oracle import expected_tokens
from penstock.workers.protocol import SamplingParams

VOCAB = 32000
VALUES = {
    "runner.kind": "oracle",
    "runner.oracle_step_s": 0.02,
    "pools.decode": 2,
    "kv.num_blocks": 512,
    "scheduler.max_model_len": 2048,
    "front.admin": "apart",
    "front.admin_port": free_port(),
}
PROMPT = list(range(1, 60))

pytestmark = [pytest.mark.ray, pytest.mark.timeout(150)]


def answer(cluster: LaunchedCluster, max_tokens: int) -> list[int]:
    return tokens_of(list(cluster.stream(model="oracle", prompt=PROMPT, max_tokens=max_tokens, temperature=0)))


def expected(max_tokens: int) -> list[int]:
    return list(expected_tokens(PROMPT, SamplingParams(max_tokens=max_tokens), VOCAB))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LaunchedCluster]:
    cluster = LaunchedCluster(tmp_path_factory.mktemp("launch"), VALUES)
    try:
        cluster.wait_ready()
        yield cluster
    finally:
        cluster.end()


@pytest.mark.slow  # exactness/test_http.py asks such a cluster in CI
def test_it_answers_exactly_and_says_what_it_is(cluster: LaunchedCluster) -> None:
    assert answer(cluster, 40) == expected(40)
    workers = cluster.workers()
    assert {(w["id"], w["role"], w["state"], w["incarnation"]) for w in workers.values()} == {
        ("prefill-0", "prefill", "ready", 1),
        ("decode-0", "decode", "ready", 1),
        ("decode-1", "decode", "ready", 1),
    }
    assert {w["pids"][0] for w in workers.values()} <= {process.pid for process in cluster.see()}
    for path in ("/status", "/metrics"):
        assert cluster.http.get(path).status_code == 404
        assert cluster.http.get(f"{cluster.admin_url}{path}").status_code == 200
        assert cluster.http.get(f"{cluster.admin_url}{path}", headers={"host": "evil.example"}).status_code == 403
    assert cluster.http.get(f"{cluster.admin_url}/v1/models").status_code == 404
    cluster.until(lambda: "Ready:" in cluster.log.read_text(), 5.0)
    assert f"/status: {cluster.admin_url}" in cluster.log.read_text()
    report = cluster.log.read_text()
    for expected_words in (
        "pools.decode",
        "Python",
        "KV pool",
        "sequences of 2,048 tokens",
        "curl -N",
        "Start-up took",
    ):
        assert expected_words in report


def test_a_killed_worker_costs_time_and_no_answer(cluster: LaunchedCluster) -> None:
    events: list[dict] = []
    stream = cluster.stream(model="oracle", prompt=PROMPT, max_tokens=150, temperature=0)
    events.append(next(stream))
    busy = ""

    def found() -> bool:
        nonlocal busy
        busy = next((w["id"] for w in cluster.workers().values() if w["role"] == "decode" and w["running"]), "")
        return bool(busy)

    reader = threading.Thread(target=lambda: events.extend(stream))
    reader.start()
    cluster.until(found, 5.0)
    os.kill(cluster.workers()[busy]["pids"][0], signal.SIGKILL)
    killed_at = time.monotonic()
    cluster.until(lambda: cluster.workers()[busy]["state"] != "ready", 2.0)
    assert time.monotonic() - killed_at < 2.0
    reader.join(30)
    assert tokens_of(events) == expected(150)
    cluster.until(lambda: cluster.workers()[busy]["state"] == "ready", 30.0)
    assert cluster.workers()[busy]["incarnation"] == 2


def test_a_killed_controller_takes_no_worker_with_it_and_takes_up_its_work(cluster: LaunchedCluster) -> None:
    before = {w["id"]: w["pids"] for w in cluster.workers().values()}
    controller = cluster.actor("ray::Controller")
    stream = cluster.stream(model="oracle", prompt=PROMPT, max_tokens=100, temperature=0)
    events = [next(stream)]
    controller.kill()
    events.extend(stream)
    assert tokens_of(events) == expected(100)
    # Between two controllers nobody tells the processes; those that are told are the same.
    told = [(pids, before[name]) for name, pids in ((w["id"], w["pids"]) for w in cluster.workers().values())]
    assert all(pids in ([], known) for pids, known in told)
    cluster.until(lambda: {w["id"]: w["pids"] for w in cluster.workers().values()} == before, 20.0)
    cluster.until(lambda: any("ray::Controller" in " ".join(p.cmdline()) for p in cluster.see()), 20.0)
    cluster.workers()
    os.kill(before["prefill-0"][0], signal.SIGKILL)
    cluster.until(lambda: cluster.workers()["prefill-0"]["pids"] not in ([], before["prefill-0"]), 40.0)
    assert {w: pids for w, pids in before.items() if w != "prefill-0"} == {
        w["id"]: w["pids"] for w in cluster.workers().values() if w["id"] != "prefill-0"
    }
    assert answer(cluster, 20) == expected(20)


def test_a_killed_ingress_breaks_its_streams_and_comes_back_on_its_port(cluster: LaunchedCluster) -> None:
    before = {w["id"]: w["pids"] for w in cluster.workers().values()}
    stream = cluster.stream(model="oracle", prompt=PROMPT, max_tokens=200, temperature=0)
    next(stream)
    cluster.actor("ray::ServeReplica").kill()
    with pytest.raises((httpx.HTTPError, RuntimeError)):
        list(stream)
    cluster.until(cluster.ready, 40.0)
    assert {w["id"]: w["pids"] for w in cluster.workers().values()} == before
    cluster.until(lambda: all(w["running"] == 0 for w in cluster.workers().values()), 5.0)
    assert answer(cluster, 20) == expected(20)


def test_sigterm_ends_everything(cluster: LaunchedCluster) -> None:
    folder = next(
        Path(part.split("=")[1])
        for process in cluster.see()
        for part in process.cmdline()
        if part.startswith("--session-dir=")
    ).parent.parent
    assert (folder / "access.json").exists()
    assert folder.stat().st_mode & 0o077 == 0  # the token in it is nobody else's, and so are Ray's sockets
    assert cluster.terminate() == 0
    assert cluster.survivors(5.0) == []
    assert not folder.exists()


@pytest.mark.slow  # test_subprocess_host.py has the quick edition
def test_a_worker_that_cannot_start_ends_the_launch_with_its_reason(tmp_path: Path) -> None:
    cluster = LaunchedCluster(tmp_path, {**VALUES, "kv.num_blocks": 1 << 36})
    try:
        cluster.until(lambda: cluster.see() is not None and cluster.process.poll() is not None, 60.0)
        assert cluster.process.returncode == 2
        assert re.search("(prefill|decode)-0 did not start: the KV pool needs", cluster.log.read_text())
        # Ray's own children look for their parent every few seconds only.
        assert cluster.survivors(40.0) == []
    finally:
        cluster.end()


@pytest.mark.slow  # test_reaper.py has the quick edition
def test_a_killed_launcher_leaves_nothing(tmp_path: Path) -> None:
    cluster = LaunchedCluster(tmp_path, {**VALUES, "pools.decode": 1})
    try:
        cluster.wait_ready()
        cluster.process.kill()
        cluster.process.wait(5)
        assert cluster.survivors(40.0) == []
    finally:
        cluster.end()
