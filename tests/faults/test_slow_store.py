"""Ray's control store answers once in five seconds: streams and new requests do not feel it, changes are merely slow.

Figures are printed; run with `-s`. A store that is away: `test_gcs_restart.py`, `test_store_gone.py`.
"""

from __future__ import annotations

import contextlib
import statistics
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from fakes.launched_cluster import LaunchedCluster
from fakes.stream_load import StreamLoad

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(240)]
VALUES = {
    "runner.kind": "oracle",
    "runner.oracle_step_s": 0.02,
    "kv.num_blocks": 2048,
    "pools.decode": 2,
    "health.worker_lease_s": 15.0,  # renewed every 2.5 s, by calls that no store is asked for
}
CALL_S = 5.0
CALM_S = 10.0
SLOW_S = 40.0  # several leases


@contextlib.contextmanager
def slow(store: psutil.Process) -> Iterator[None]:
    """It stands still for so long between two moments in which it answers what waits."""
    over = threading.Event()

    def hold() -> None:
        while not over.is_set():
            store.suspend()
            over.wait(CALL_S)
            store.resume()
            over.wait(0.2)

    holding = threading.Thread(target=hold)
    holding.start()
    try:
        yield
    finally:
        over.set()
        holding.join()


def test_a_store_whose_answers_take_five_seconds(tmp_path: Path) -> None:
    cluster = LaunchedCluster(tmp_path, VALUES)
    try:
        cluster.wait_ready(90.0)
        (store,) = [each for each in cluster.see() if "gcs_server" in each.name()]
        pids = {name: worker["pids"] for name, worker in cluster.workers().items()}
        load = StreamLoad(cluster.url, "oracle").start()
        time.sleep(CALM_S)
        calm, waits = list(load.gaps_s), list(load.first_token_s)
        with slow(store):
            time.sleep(SLOW_S / 2)
            gaps, begun = load.gaps_s[len(calm) :], load.first_token_s[len(waits) :]
            psutil.Process(pids["decode-0"][0]).kill()
            killed = time.monotonic()
            cluster.until(lambda: cluster.workers()["decode-0"]["state"] != "ready", 10.0)
            back_s = cluster.until(lambda: cluster.workers()["decode-0"]["state"] == "ready", 90.0)
            time.sleep(max(0.0, killed + SLOW_S / 2 - time.monotonic()))
            cluster.see()
        load.stop()
        kept = {name: worker["pids"] for name, worker in cluster.workers().items()}
        middle, beside = statistics.median(calm), statistics.median(gaps)
        print(
            f"F43 a store that takes 5 s | {load.done} streams, {len(load.failed)} failed, {load.wrong} wrong | "
            f"a token each {beside * 1e3:.1f} ms, before {middle * 1e3:.1f} | longest {max(gaps) * 1e3:.0f}, before "
            f"{max(calm) * 1e3:.0f} ms | first token {statistics.median(begun) * 1e3:.0f} ms, before "
            f"{statistics.median(waits) * 1e3:.0f} | a killed worker is back after {back_s:.1f} s"
        )
        assert (load.failed, load.wrong) == ([], 0)
        assert len(begun) > 60
        assert beside < 1.2 * middle + 0.005
        assert max(gaps) < 1.0, "something waited for the store"
        assert max(begun) < 2.0
        assert {name for name in pids if kept[name] != pids[name]} == {"decode-0"}
    finally:
        cluster.end()
