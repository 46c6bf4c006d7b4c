"""A worker that is started beside running ones is offered them as sources of its weights, and takes them from there."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
from pathlib import Path

import pytest
from fakes.exactness import CheckpointSpec, Reference, make_checkpoint
from fakes.launched_cluster import LaunchedCluster, tokens_of
from fakes.liveness import alive
from fakes.weight_sources import KEY

from penstock.cluster.local import LocalCluster
from penstock.cluster.supervision import Backoff
from penstock.workers.protocol import GenerateRequest, Role, SamplingParams
from penstock.workers.settings import (
    GroupSettings,
    KVSettings,
    RunnerSettings,
    SchedulerSettings,
    WeightSettings,
    WorkerSettings,
)

TOKENS = 12
PROMPT = tuple(range(3, 60))


def worker(index: int, model_dir: Path, width: int = 1) -> WorkerSettings:
    return WorkerSettings(
        f"mixed-{index}",
        Role.MIXED,
        cluster_key=KEY,
        scheduler=SchedulerSettings(max_num_seqs=32, max_model_len=256),
        kv=KVSettings(num_blocks=256),
        runner=RunnerSettings(model_dir=str(model_dir), dtype="float32"),
        weights=WeightSettings(source="peer"),
        group=GroupSettings(width, start_timeout_s=60.0),
    )


@pytest.mark.timeout(120)
@pytest.mark.slow
def test_a_restarted_worker_of_two_ranks_takes_its_weights_from_one_of_one(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path / "model", CheckpointSpec(heads=6, kv_heads=2))

    async def scenario() -> list[int]:
        workers = [worker(0, directory), worker(1, directory, width=2)]
        cluster = LocalCluster(workers, backoff=Backoff(first_s=0.05), log_file=tmp_path / "log")
        async with cluster:
            before = {pid for status in cluster.fleet.workers() for pid in status.pids}
            assert "weights from peers" not in (tmp_path / "log").read_text()
            cluster.kill("mixed-1")
            async with asyncio.timeout(60.0):
                # a process that ends sets no event of ours
                while cluster.fleet.workers()[1].restarts == 0:  # noqa: ASYNC110
                    await asyncio.sleep(0.02)
            assert await cluster.wait_ready(60.0)
            log = (tmp_path / "log").read_text()
            source = cluster.process("mixed-0").weights_addresses[0]
            lines = [line for line in log.splitlines() if "weights from peers" in line]
            assert sorted(title for title in ("mixed-1/0", "mixed-1/1") for line in lines if title in line) == [
                "mixed-1/0",
                "mixed-1/1",
            ]
            assert all(f"{source} admits us" in line and " 0.0 MB from disk" in line for line in lines)
            cluster.kill("mixed-0")  # what follows is the new worker's
            request = GenerateRequest("q", PROMPT, SamplingParams(TOKENS))
            tokens = [token async for delta in cluster.generator.submit(request) for token in delta.tokens]
            verdict = Reference(directory).judge([PROMPT], [tokens])
            assert (verdict.steps, verdict.wrong) == (TOKENS, [])
            pids = before | {pid for status in cluster.fleet.workers() for pid in status.pids}
        assert [pid for pid in pids if alive(pid)] == []
        return tokens

    asyncio.run(scenario())


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_restarted_actor_takes_its_weights_from_the_other(tmp_path: Path) -> None:
    values = {
        "runner.model_dir": str(make_checkpoint(tmp_path / "model", CheckpointSpec())),
        "runner.dtype": "float32",
        "front.skip_tokenizer_init": True,
        "pools.mixed": 2,
        "kv.num_blocks": 256,
        "scheduler.max_model_len": 256,
        "weights.source": "peer",
    }
    cluster = LaunchedCluster(tmp_path, values)
    asked = {"model": "model", "prompt": list(PROMPT), "max_tokens": TOKENS, "temperature": 0}
    from_peer = 'penstock_weights_loaded_bytes_total{model_name="model",role="mixed",source="peer",worker="mixed-1"} '

    def loaded() -> float:
        lines = cluster.http.get("/metrics").text.splitlines()
        return next((float(line.split()[-1]) for line in lines if line.startswith(from_peer)), 0.0)

    try:
        cluster.wait_ready(90.0)
        cluster.until(lambda: all(each["state"] == "ready" for each in cluster.workers().values()), 60.0)
        first = tokens_of(list(cluster.stream(**asked)))
        assert (len(first), loaded()) == (TOKENS, 0.0)
        os.kill(cluster.workers()["mixed-1"]["pids"][0], signal.SIGKILL)
        cluster.until(lambda: cluster.workers()["mixed-1"]["restarts"] == 1, 60.0)
        cluster.until(lambda: cluster.workers()["mixed-1"]["state"] == "ready" and loaded() > 1 << 20, 90.0)
        assert tokens_of(list(cluster.stream(**asked))) == first
    finally:
        cluster.end()


def test_settings_carry_peers_to_a_process() -> None:
    told = dataclasses.replace(worker(0, Path("m")), weight_peers=("10.0.0.1:5", "[::1]:6"))
    assert WorkerSettings.from_json(told.to_json()) == told
