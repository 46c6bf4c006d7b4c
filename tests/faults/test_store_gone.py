"""Ray's control store dies and nobody keeps its state: the cluster ends by itself, says why, and leaves nothing.

With a store that is kept: `test_gcs_restart.py`.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from fakes.launched_cluster import LaunchedCluster

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(240)]
VALUES = {"runner.kind": "oracle", "kv.num_blocks": 512, "runner.oracle_step_s": 0.01}
PATIENCE_S = 120.0  # Ray itself waits 60 s for its store


def test_the_store_killed_without_a_copy(tmp_path: Path) -> None:
    cluster = LaunchedCluster(tmp_path, VALUES)
    try:
        cluster.wait_ready(90.0)
        (store,) = [each for each in cluster.see() if "gcs_server" in each.name()]
        store.kill()
        began = time.monotonic()
        code = cluster.process.wait(PATIENCE_S)
        took = time.monotonic() - began
        said = cluster.log.read_text()
        left = cluster.survivors(15.0)
        print(f"F18 the store killed | ended with {code} after {took:.1f} s | processes left {len(left)}")
        assert code == 1
        assert "GCS may have been killed" in said
        assert left == []
    finally:
        cluster.end()
