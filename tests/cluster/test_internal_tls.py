"""Real worker processes whose calls and KV are encrypted: texts are right, strangers stay outside."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path

import pytest
from fakes.certificates import Authority
from fakes.oracle_cluster import KEY, VOCAB, Pace, oracle_request, oracle_workers

from penstock.cluster.local import LocalCluster
from penstock.cluster.supervision import Backoff
from penstock.workers.errors import RefusedError
from penstock.workers.oracle import expected_tokens
from penstock.workers.rpc import WorkerClient

PACE = Pace(step_s=0.001, transport="tcp")


@pytest.mark.timeout(90)
def test_streams_and_seals_hold_within_tls_also_over_a_death(tmp_path: Path) -> None:
    tls = Authority(tmp_path).settings()
    workers = [dataclasses.replace(worker, tls=tls) for worker in oracle_workers(1, 1, PACE)]

    async def scenario() -> None:
        async def text(cluster: LocalCluster, number: int) -> None:
            request = oracle_request(number, 60, 40, PACE)
            tokens = [token async for delta in cluster.generator.submit(request) for token in delta.tokens]
            assert tuple(tokens) == expected_tokens(request.prompt, request.sampling, VOCAB)

        cluster = LocalCluster(workers, backoff=Backoff(first_s=0.05), log_file=tmp_path / "log")
        async with cluster:
            await asyncio.gather(*(text(cluster, number) for number in range(20)))
            for entry in cluster.supervisor.roster.entries:
                await _plain_callers_are_refused(entry.address)
            cluster.kill("decode-0")
            await asyncio.gather(*(text(cluster, number) for number in range(20, 30)))
            assert await cluster.wait_ready(20.0)

    asyncio.run(scenario())
    assert Path(tls.key_file).read_text().splitlines()[1] not in (tmp_path / "log").read_text()


async def _plain_callers_are_refused(address: str) -> None:
    client = WorkerClient(address, KEY)
    with pytest.raises(RefusedError, match=r"unavailable|deadline"):
        await client.status(1.0)
    await client.close()
