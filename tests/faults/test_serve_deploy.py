"""Serve's own commands on two Ray nodes, under load: scale, replace, kill, delete. Nothing is lost, nothing is left.

Figures (seconds, counts) are printed; run with `-s`.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator

import httpx
import pytest
from fakes.serve_cluster import NAME, OURS, ServeCluster
from fakes.stream_load import StreamLoad, oracle_answer

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[ServeCluster]:
    cluster = ServeCluster()
    try:
        yield cluster
    finally:
        cluster.end()


def direct(cluster: ServeCluster) -> str:
    return f"http://127.0.0.1:{cluster.direct_port}"


def ask(cluster: ServeCluster, url: str, max_tokens: int = 20) -> list[int]:
    body = {
        "model": "oracle",
        "prompt": [5, 6, 7],
        "max_tokens": max_tokens,
        "temperature": 0,
        "return_token_ids": True,
    }
    answer = httpx.post(f"{url}/v1/completions", json=body, trust_env=False, timeout=30.0)
    answer.raise_for_status()
    tokens: list[int] = answer.json()["choices"][0]["token_ids"]
    return tokens


def test_scaling_and_replacing_under_load(cluster: ServeCluster) -> None:
    cluster.deploy(cluster.file())
    cluster.wait_pools(1)
    loads = [StreamLoad(cluster.url, "oracle").start(), StreamLoad(direct(cluster), "oracle", rate_s=3.0).start()]
    times: dict[str, float] = {}

    def timed(what: str, began: float) -> None:
        times[what] = round(time.monotonic() - began, 1)

    began = time.monotonic()
    cluster.deploy(cluster.file(decode=3))
    cluster.wait_pools(3)
    timed("decode 1 to 3, with the command", began)
    began = time.monotonic()
    cluster.deploy(cluster.file(decode=1))
    cluster.wait_pools(1)
    timed("decode 3 to 1, drained", began)
    began = time.monotonic()
    cluster.penstock("scale", "--decode", "2", "--address", cluster.address)
    cluster.wait_pools(2)
    timed("penstock scale to 2", began)
    before = set(cluster.workers())
    cluster.deploy(cluster.file(decode=1, front={"served_model_name": ["oracle", "other"]}))
    cluster.until(lambda: len(cluster.http.get("/v1/models").json()["data"]) == 2, 60.0)
    assert set(cluster.workers()) == before, "a changed front is no reason to replace workers, nor to undo a scale"
    began = time.monotonic()
    cluster.deploy(cluster.file(decode=2, scheduler={"max_num_seqs": 64}))
    cluster.until(lambda: not set(cluster.workers()) & before, 90.0)
    cluster.until(lambda: len(cluster.processes("ray::WorkerActor")) == 3, 90.0)
    timed("all workers replaced", began)
    for load in loads:
        load.stop()
    print(times, "requests", [load.done for load in loads])
    assert [(load.failed, load.wrong) for load in loads] == [([], 0), ([], 0)]


def test_rolling_all_workers_under_load(cluster: ServeCluster) -> None:
    cluster.deploy(cluster.file(decode=2, scheduler={"max_num_seqs": 64}))
    cluster.wait_pools(2)
    before = set(cluster.workers())
    loads = [StreamLoad(cluster.url, "oracle").start(), StreamLoad(direct(cluster), "oracle", rate_s=3.0).start()]
    time.sleep(2)
    began = time.monotonic()
    assert "3 workers" in cluster.penstock("roll", "--address", cluster.address)
    cluster.until(lambda: not set(cluster.workers()) & before, 120.0)
    cluster.until(lambda: len(cluster.processes("ray::WorkerActor")) == 3, 60.0)
    took = time.monotonic() - began
    time.sleep(2)
    for load in loads:
        load.stop()
    print("rolled in", round(took, 1), "s, requests", [load.done for load in loads])
    assert [(load.failed, load.wrong) for load in loads] == [([], 0), ([], 0)]
    assert all(load.done > 0 for load in loads)
    cluster.wait_pools(2)


def test_a_deployment_that_cannot_start_leaves_the_old_one_serving(cluster: ServeCluster) -> None:
    load = StreamLoad(cluster.url, "oracle", rate_s=3.0).start()
    cluster.deploy(cluster.file(decode=2, kv={"num_blocks": 1 << 36}))
    cluster.until(lambda: cluster.application(NAME).get("status") in ("DEPLOY_FAILED", "UNHEALTHY"), 150.0)
    assert "the KV pool needs" in str(cluster.application(NAME))
    load.stop()
    assert (load.failed, load.wrong) == ([], 0)
    cluster.deploy(cluster.file(decode=2, scheduler={"max_num_seqs": 64}))
    cluster.until(lambda: cluster.application(NAME).get("status") == "RUNNING", 60.0)
    cluster.until(lambda: len(cluster.processes("ray::WorkerActor")) == 3, 60.0)


def test_a_killed_controller_is_not_noticed(cluster: ServeCluster) -> None:
    load = StreamLoad(cluster.url, "oracle").start()
    before = {worker["id"]: worker["pids"] for worker in cluster.workers().values()}
    (controller,) = cluster.processes("ray::Controller")
    controller.kill()
    cluster.until(lambda: [p for p in cluster.processes("ray::Controller") if p.pid != controller.pid], 40.0)
    time.sleep(2)
    assert {worker["id"]: worker["pids"] for worker in cluster.workers().values()} == before
    victim = next(worker for worker in cluster.workers().values() if worker["role"] == "decode")
    next(process for process in cluster.see() if process.pid in victim["pids"]).kill()
    cluster.until(lambda: cluster.workers().get(victim["id"], {}).get("pids") not in ([], None, victim["pids"]), 40.0)
    load.stop()
    assert (load.failed, load.wrong) == ([], 0)


@pytest.mark.parametrize("way", ["proxy", "direct"])
def test_a_killed_ingress_breaks_its_streams_visibly_and_comes_back(cluster: ServeCluster, way: str) -> None:
    url = cluster.url if way == "proxy" else direct(cluster)
    before = {worker["id"]: worker["pids"] for worker in cluster.workers().values()}
    load = StreamLoad(url, "oracle", rate_s=3.0).start()
    time.sleep(2)
    (replica,) = cluster.processes("ray::ServeReplica")
    replica.kill()
    time.sleep(1)

    def answers() -> bool:
        try:
            return ask(cluster, url) == oracle_answer([5, 6, 7], 20)
        except httpx.HTTPError:
            return False

    took = cluster.until(answers, 60.0)
    seen, done = len(load.failed), load.done
    time.sleep(4)
    load.stop()
    print(way, "back after", round(took + 1, 1), "s; broken:", load.failed)
    assert load.wrong == 0, "a stream ended short as if it were whole"
    assert len(load.failed) == seen, "something failed after it was back"
    assert load.done > done
    assert {worker["id"]: worker["pids"] for worker in cluster.workers().values()} == before


def test_a_lost_node_is_said_and_its_workers_come_back_on_another(cluster: ServeCluster) -> None:
    """The node holds every decode worker and the ingress."""
    while not cluster.on_second("ray::ServeReplica"):  # Serve starts it here and there
        (replica,) = cluster.processes("ray::ServeReplica")
        replica.kill()
        cluster.until(lambda gone=replica: [p for p in cluster.processes("ray::ServeReplica") if p != gone], 40.0)
        cluster.until(lambda: cluster.ready_roles().get("decode"), 40.0)
    cluster.kill_second()
    wanted = "waiting for 0.25 CPU, 1 decode: no node has it"

    def said() -> bool:
        reasons = {worker["reason"] for worker in cluster.workers().values() if worker["role"] == "decode"}
        return reasons == {wanted}

    print("said after", round(cluster.until(said, 90.0), 1), "s")
    assert cluster.http.get("/ready").status_code == 503
    cluster.start_second()
    took = cluster.wait_pools(2, 120.0)
    print("back on the new node after", round(took, 1), "s")
    assert ask(cluster, cluster.url) == oracle_answer([5, 6, 7], 20)


def test_deleting_and_deploying_again_and_shutting_down_leave_nothing(cluster: ServeCluster) -> None:
    cluster.deploy({**cluster.file(), "applications": []})
    print("gone after", round(cluster.wait_gone(), 1), "s")
    cluster.deploy(cluster.file())
    cluster.wait_pools(1)
    assert ask(cluster, cluster.url) == oracle_answer([5, 6, 7], 20)
    cluster.shutdown_serve()
    cluster.wait_gone()
    assert cluster.processes(*OURS, "ray::ServeReplica") == []


def test_serve_run_without_a_file(cluster: ServeCluster) -> None:
    options = ["--non-blocking", "--name", "adhoc", "penstock.cluster.serve_app:build"]
    pins = ["ray.prefill_resources={prefill: 1}", "ray.decode_resources={decode: 1}"]
    cluster.serve("run", *options, "runner.kind=oracle", "kv.num_blocks=512", f"port={cluster.direct_port}", *pins)
    assert ask(cluster, direct(cluster)) == oracle_answer([5, 6, 7], 20)
    cluster.shutdown_serve()
    cluster.wait_gone()


def test_penstock_serve_on_a_cluster_that_runs_already(cluster: ServeCluster) -> None:
    values = cluster.folder / "penstock.yaml"
    values.write_text("runner: {kind: oracle}\nkv: {num_blocks: 512}\nray: {decode_resources: {decode: 1}}\n")
    launcher = cluster.begin_penstock(
        "serve", "--address", cluster.address, "--port", str(cluster.direct_port), "--config", str(values)
    )
    try:

        def ready() -> bool:
            assert launcher.poll() is None, (cluster.folder / "penstock.log").read_text()
            try:
                return httpx.get(f"{direct(cluster)}/ready", trust_env=False).status_code == 200
            except httpx.HTTPError:
                return False

        cluster.until(ready, 90.0)
        assert ask(cluster, direct(cluster)) == oracle_answer([5, 6, 7], 20)
    finally:
        launcher.send_signal(signal.SIGTERM)
        assert launcher.wait(40) == 0
    cluster.wait_gone()


def test_the_embedded_model_scales_without_a_changed_word(cluster: ServeCluster) -> None:
    cluster.deploy(cluster.file(model={}))
    cluster.wait_pools(1, 120.0)
    questions = ["Add 23 and 45.", "Add 71 and 18.", "Tell me a story about a fox."]

    def answer(question: str) -> str:
        messages = [{"role": "user", "content": question}]
        body = {"messages": messages, "max_tokens": 60, "temperature": 0, "model": "embedded"}
        body["model"] = cluster.http.get("/v1/models").json()["data"][0]["id"]
        reply = cluster.http.post("/v1/chat/completions", json=body)
        reply.raise_for_status()
        text: str = reply.json()["choices"][0]["message"]["content"]
        return text

    expected = [answer(question) for question in questions]
    for decode in (2, 1):
        cluster.deploy(cluster.file(model={}, decode=decode))
        until = time.monotonic() + 15
        while time.monotonic() < until:
            assert [answer(question) for question in questions] == expected
        cluster.wait_pools(decode)
    cluster.shutdown_serve()
    cluster.wait_gone()
