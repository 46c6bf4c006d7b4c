"""Workers of several ranks as Ray actors: killed by rank, adopted whole, refused with numbers, spread over nodes."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from fakes.launched_cluster import LaunchedCluster, tokens_of
from fakes.two_node_ray import TwoNodeRay

from penstock.workers.oracle import expected_tokens
from penstock.workers.protocol import SamplingParams

VOCAB = 32000
VALUES = {
    "runner.kind": "oracle",
    "runner.oracle_step_s": 0.02,
    "pools.prefill_tensor_parallel_size": 1,
    "pools.decode_tensor_parallel_size": 2,
    "kv.num_blocks": 512,
    "scheduler.max_model_len": 2048,
    "router.placement.local_prefill_tokens": 0,
}
PROMPT = list(range(1, 60))

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(200)]


def expected(max_tokens: int) -> list[int]:
    return list(expected_tokens(PROMPT, SamplingParams(max_tokens=max_tokens), VOCAB))


def answer(cluster: LaunchedCluster, max_tokens: int) -> list[int]:
    return tokens_of(list(cluster.stream(model="oracle", prompt=PROMPT, max_tokens=max_tokens, temperature=0)))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LaunchedCluster]:
    cluster = LaunchedCluster(tmp_path_factory.mktemp("launch"), VALUES)
    try:
        cluster.wait_ready(90.0)
        yield cluster
    finally:
        cluster.end()


def ready(cluster: LaunchedCluster, worker_id: str, restarts: int) -> bool:
    worker = cluster.workers()[worker_id]
    return worker["state"] == "ready" and worker["restarts"] == restarts


LOSSES = [(1, signal.SIGKILL, 1), (0, signal.SIGKILL, 2), (1, signal.SIGSTOP, 3)]


@pytest.mark.parametrize(("rank", "number", "restarts"), LOSSES)
def test_a_group_whose_rank_is_lost_is_one_death(
    cluster: LaunchedCluster, rank: int, number: int, restarts: int
) -> None:
    pids = cluster.workers()["decode-0"]["pids"]
    assert len(set(pids)) == cluster.workers()["decode-0"]["width"] == 2
    got: list[list[int]] = []
    asking = [threading.Thread(target=lambda: got.append(answer(cluster, 100))) for _ in range(4)]
    for thread in asking:
        thread.start()
    time.sleep(0.7)
    os.kill(pids[rank], number)
    assert cluster.until(lambda: cluster.workers()["decode-0"]["restarts"] == restarts, 10.0) < 5.0
    cluster.until(lambda: ready(cluster, "decode-0", restarts), 40.0)
    for thread in asking:
        thread.join()
    assert got == [expected(100)] * 4
    assert psutil.wait_procs([psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)], timeout=5.0)[1] == []
    assert cluster.workers()["prefill-0"]["restarts"] == 0


def test_a_controller_that_comes_back_adopts_whole_groups(cluster: LaunchedCluster) -> None:
    before = {name: worker["pids"] for name, worker in cluster.workers().items()}
    cluster.actor("ray::Controller").kill()
    time.sleep(4.0)
    cluster.until(lambda: ready(cluster, "decode-0", cluster.workers()["decode-0"]["restarts"]), 20.0)
    assert answer(cluster, 30) == expected(30)
    assert {name: worker["pids"] for name, worker in cluster.workers().items()} == before
    rank = before["decode-0"][1]
    restarts = cluster.workers()["decode-0"]["restarts"]
    os.kill(rank, signal.SIGKILL)
    cluster.until(lambda: ready(cluster, "decode-0", restarts + 1), 40.0)
    assert answer(cluster, 30) == expected(30), "what was adopted is watched and replaced like what was started"


def test_metrics_show_width_and_processes(cluster: LaunchedCluster) -> None:
    page = cluster.http.get("/metrics").text
    assert 'penstock_worker_ranks{model_name="oracle",role="decode",worker="decode-0"} 2.0' in page
    pids = cluster.workers()["decode-0"]["pids"]
    for rank, pid in enumerate(pids):
        labels = f'model_name="oracle",pid="{pid}",rank="{rank}",role="decode",worker="decode-0"'
        assert f"penstock_worker_process_info{{{labels}}} 1.0" in page


def test_it_goes_away_without_a_rest(cluster: LaunchedCluster) -> None:
    assert cluster.terminate() == 0
    assert cluster.survivors(10.0) == []


def test_ranks_are_spread_over_nodes_where_none_holds_them_all_and_it_is_said(tmp_path: Path) -> None:
    """Two nodes with room for one rank each: PACK, with the reason; a third rank is refused with the numbers."""
    ray = TwoNodeRay({"part": 1}, {"part": 1})
    try:
        file = tmp_path / "cluster.yaml"
        file.write_text(
            "runner: {kind: oracle}\npools: {mixed: 1}\nkv: {num_blocks: 512}\nscheduler: {max_model_len: 2048}\n"
            "ray: {mixed_resources: {part: 1}}\n"
        )
        serve = ("serve", "--config", str(file), "--address", ray.address, "--port", str(ray.direct_port))
        serve += ("--admin", "shared")
        with pytest.raises(RuntimeError, match="3 part are needed, the nodes have 2; 2 such ranks would fit"):
            ray.penstock(*serve, "--tensor-parallel-size", "3", timeout_s=90.0)
        served = ray.begin_penstock(*serve, "--tensor-parallel-size", "2")
        try:
            check_spread(ray, served)
        finally:
            served.terminate()
            served.wait(40.0)
        ray.until(lambda: not ray.processes("ray::WorkerActor", "ray::Controller"), 30.0)
        # Nothing holds what the group held: the next one finds its place.
        again = ray.begin_penstock(*serve, "--tensor-parallel-size", "2")
        try:
            check_spread(ray, again)
        finally:
            again.terminate()
            again.wait(40.0)
    finally:
        ray.end()


def check_spread(ray: TwoNodeRay, served: subprocess.Popen[bytes]) -> None:
    url = f"http://127.0.0.1:{ray.direct_port}"

    def up() -> bool:
        assert served.poll() is None, (ray.folder / "penstock.log").read_text()
        try:
            return httpx.get(f"{url}/ready", trust_env=False).status_code == 200
        except httpx.HTTPError:
            return False

    ray.until(up, 90.0)
    (worker,) = httpx.get(f"{url}/status", trust_env=False).json()["workers"]
    assert worker["width"] == len(set(worker["pids"])) == 2
    assert "may be on several nodes: none has room for 2 x (0.25 CPU, 1 part), the largest for 1" in worker["placement"]
    body = {"model": "oracle", "prompt": PROMPT, "max_tokens": 20, "temperature": 0, "return_token_ids": True}
    found = httpx.post(f"{url}/v1/completions", json=body, trust_env=False, timeout=30.0).json()
    assert found["choices"][0]["token_ids"] == expected(20)
    assert "may be on several nodes" in ray.penstock("status", "--url", url)
