"""The local cluster: real worker processes, without Ray. Killing them under load is tests/faults' job."""

import asyncio
import dataclasses
from pathlib import Path

import pytest
from fakes.liveness import alive
from fakes.oracle_cluster import VOCAB, Pace, oracle_request, oracle_workers

from penstock.cluster.local import LocalCluster
from penstock.cluster.supervision import Backoff, StartError
from penstock.workers.oracle import expected_tokens

PACE = Pace(step_s=0.001)


@pytest.mark.timeout(60)
def test_it_serves_restarts_and_leaves_nothing(tmp_path: Path) -> None:
    async def scenario() -> None:
        cluster = LocalCluster(oracle_workers(1, 1, PACE), backoff=Backoff(first_s=0.05), log_file=tmp_path / "log")
        async with cluster:
            request = oracle_request(1, 40, 20, PACE)
            tokens = [token async for delta in cluster.generator.submit(request) for token in delta.tokens]
            assert tuple(tokens) == expected_tokens(request.prompt, request.sampling, VOCAB)
            killed = cluster.kill("decode-0")
            async with asyncio.timeout(20.0):
                # a process that ends sets no event of ours
                while alive(killed) or cluster.fleet.workers()[1].restarts == 0:  # noqa: ASYNC110
                    await asyncio.sleep(0.02)
            assert await cluster.wait_ready(20.0)
            status = {worker.id: worker for worker in cluster.fleet.workers()}["decode-0"]
            assert (status.incarnation, status.restarts, status.reason) == (2, 1, "")
            assert cluster.process("decode-0").pids != (killed,)
            pids = [pid for worker in cluster.fleet.workers() for pid in worker.pids]
            with pytest.raises(KeyError):
                cluster.process("nobody")
        assert all(not alive(pid) for pid in [killed, *pids])

    asyncio.run(scenario())


@pytest.mark.timeout(60)
def test_a_worker_that_cannot_start_says_why_and_takes_the_others_along(tmp_path: Path) -> None:
    async def scenario() -> None:
        good, bad = oracle_workers(1, 1, PACE)
        bad = dataclasses.replace(bad, kv=dataclasses.replace(bad.kv, num_blocks=2))
        cluster = LocalCluster([good, bad], log_file=tmp_path / "log")
        with pytest.raises(StartError, match="decode-0 did not start: the KV pool holds 2 blocks"):
            await cluster.start()
        assert cluster.supervisor.hosted("prefill-0") is None
        await cluster.stop()

    asyncio.run(scenario())
