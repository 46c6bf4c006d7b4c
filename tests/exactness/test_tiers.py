"""KV that went to host memory and disk and came back, against transformers; and over a worker that is killed."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fakes.exactness import CheckpointSpec, covering_specs
from fakes.in_ci import every
from fakes.liveness import alive
from fakes.oracle_cluster import ROOT, VOCAB, Pace, Streams, leaked_blocks, oracle_worker
from fakes.threaded_cluster import ThreadedCluster
from fakes.variants import Variant, greedy

from penstock.cluster.local import LocalCluster
from penstock.workers.kv.prefix_cache import chain_digests
from penstock.workers.protocol import GenerateRequest, Role, SamplingParams
from penstock.workers.totals import TierTotals

TOKENS = 12
ROUNDS = 3


@pytest.mark.parametrize(
    ("split", "ahead", "host_blocks"), every(2, [(False, False, 24), (True, False, 400), (False, True, 24)])
)
def test_greedy_output_equals_transformers(
    checkpoint: Callable[[CheckpointSpec], Any], tmp_path: Path, split: bool, ahead: bool, host_blocks: int
) -> None:
    """A pool of 22 blocks, ten conversations of seven blocks in turn: what a turn finds was in a tier, or nowhere."""
    model = checkpoint(covering_specs()[0])
    rng = random.Random(7)
    prompts = [tuple(rng.randrange(model.spec.vocab) for _ in range(112)) for _ in range(10)]
    variant = Variant(split=split, chunk=64, caching=True, preempt=True, ahead=ahead)
    block_bytes = 0

    async def serve(with_tiers: bool) -> tuple[list[Any], list[TierTotals]]:
        nonlocal block_bytes
        workers = variant.workers(model.directory)
        if with_tiers:
            kv = replace(
                workers[0].kv, host_bytes=host_blocks * block_bytes, disk_path=str(tmp_path), disk_bytes=1 << 30
            )
            workers = [replace(worker, kv=kv) for worker in workers]
        answers = []
        async with ThreadedCluster(workers, variant.router) as cluster, asyncio.timeout(60.0):
            for _ in range(ROUNDS):
                for prompt in prompts:
                    answers += await cluster.generate(greedy([prompt], TOKENS))
            loads = [hosted.worker._engine.load().totals.tiers for hosted in cluster.workers.values()]
            block_bytes = next(iter(cluster.workers.values())).storage.block_bytes
        return answers, loads

    without, _ = asyncio.run(serve(with_tiers=False))
    answers, loads = asyncio.run(serve(with_tiers=True))
    model.require_exact(prompts * ROUNDS, [answer.tokens for answer in answers])
    assert [answer.tokens for answer in answers] == [answer.tokens for answer in without]
    found = sum(answer.cached_tokens for answer in answers)
    assert found > 2 * sum(answer.cached_tokens for answer in without)
    assert sum(load.host.hits + load.disk.hits for load in loads) > 50
    if host_blocks == 24:
        assert sum(load.disk.hits for load in loads) > 0
    assert all(load.host.errors == load.disk.errors == 0 for load in loads)


@pytest.mark.timeout(90)
def test_a_killed_worker_finds_its_blocks_on_disk_again(tmp_path: Path) -> None:
    """Real processes: texts stay right over the death of the worker, and what it had written serves its successor."""
    pace = Pace(num_blocks=600, step_s=0.0, token_s=0.0005)
    worker = oracle_worker(Role.MIXED, 0, pace)
    kv = replace(worker.kv, host_bytes=1 << 20, disk_path=str(tmp_path / "kv"), disk_bytes=64 << 20)
    rng = random.Random(5)
    prompts = [tuple(rng.randrange(VOCAB) for _ in range(800)) for _ in range(6)]

    def requests(number: int) -> list[GenerateRequest]:
        return [
            GenerateRequest(
                f"r{number}-{index}",
                prompt,
                SamplingParams(8, temperature=1.0, seed=index),
                prefix_root=ROOT,
                prefix_digests=chain_digests(ROOT, prompt, pace.block_size),
            )
            for index, prompt in enumerate(prompts)
        ]

    async def scenario() -> None:
        cluster = LocalCluster([replace(worker, kv=kv)], log_file=tmp_path / "log")
        async with cluster:
            first = cluster.process("mixed-0").pids
            for number in range(2):
                for request in requests(number):
                    await Streams(cluster).run([request])
            await totals(cluster, lambda tiers: tiers.disk.held >= 1000 and tiers.host.hits + tiers.disk.hits > 100)
            cluster.kill("mixed-0")
            streams = Streams(cluster)
            tally = await asyncio.wait_for(streams.run(requests(2)), 40)
            assert (tally.completed, tally.wrong) == (len(prompts), [])
            assert await cluster.wait_ready(20)
            await totals(cluster, lambda tiers: tiers.disk.held >= 1000)
            tally = await asyncio.wait_for(Streams(cluster).run(requests(3)), 40)
            assert (tally.completed, tally.wrong) == (len(prompts), [])
            after = await totals(cluster, lambda tiers: tiers.disk.hits > 0)
            assert after.disk.errors == after.host.errors == 0
            assert await leaked_blocks(cluster) == 0
            pids = {*first, *cluster.process("mixed-0").pids}
        assert [pid for pid in pids if alive(pid)] == []

    asyncio.run(scenario())


async def totals(cluster: LocalCluster, enough: Callable[[TierTotals], bool]) -> TierTotals:
    """What the worker says of its tiers, once that is enough."""
    async with asyncio.timeout(20):
        while True:
            for status in cluster.fleet.workers():
                if status.state == "ready" and enough(status.totals.tiers):
                    return status.totals.tiers
            await asyncio.sleep(0.05)
