"""Ray's control store is killed for 50 seconds and comes back: streams go on, and a worker lost meanwhile is replaced.

Figures are printed; run with `-s`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest
from fakes.durable_ray import DurableRay
from fakes.serve_cluster import OURS
from fakes.stream_load import StreamLoad

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(400)]

AWAY_S = 50.0


@pytest.fixture
def cluster() -> Iterator[DurableRay]:
    cluster = DurableRay()
    try:
        yield cluster
    finally:
        cluster.end()


def test_streams_go_on_while_the_control_store_is_away(cluster: DurableRay) -> None:
    cluster.deploy(cluster.file(decode=2))
    cluster.wait_pools(2)
    if os.geteuid() == 0:  # may take the normal priority: Ray's dashboard computes all the time that the store is away
        assert {process.nice() for process in cluster.processes(*OURS, "ray::ServeReplica")} == {0}
    before = {worker["id"]: worker["pids"] for worker in cluster.workers().values()}
    load = StreamLoad(cluster.url, "oracle").start()
    time.sleep(3)
    cluster.kill_gcs()
    done = load.done
    time.sleep(AWAY_S / 3)
    victim = next(worker for worker in before if worker.startswith("decode"))
    next(process for process in cluster.see() if process.pid in before[victim]).kill()
    cluster.until(lambda: cluster.workers()[victim]["state"] != "ready", 10.0)
    time.sleep(AWAY_S * 2 / 3)
    served = load.done - done
    kept = {worker["id"]: worker["pids"] for worker in cluster.workers().values() if worker["id"] != victim}
    cluster.start_gcs()
    back = time.strftime("%X")
    took = cluster.wait_pools(2, 90.0)
    time.sleep(5)
    load.stop()
    print(f"{served} streams without a control store; both pools complete {took:.1f} s after it; {load.done} in all")
    assert (load.failed, load.wrong) == ([], 0), f"store back at {back}"
    assert served > 60
    assert kept == {worker: pids for worker, pids in before.items() if worker != victim}
    cluster.penstock("scale", "--decode", "3", "--address", cluster.address)
    cluster.wait_pools(3)
