"""One split cluster for a file of client tests: the embedded model, one prefill and one decode worker, a key."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fakes.ports import free_port
from fakes.served_cluster import ServedCluster

KEY = "sk-test-key"
MODEL = "penstock-embedded"


class KeyedCluster(ServedCluster):
    """`penstock serve` as a user starts it, with a key and gRPC."""

    key = KEY
    model = MODEL

    @property
    def base_url(self) -> str:
        return f"{self.url}/v1"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KeyedCluster]:
    grpc_port = free_port()
    options = ["--prefill", "1", "--decode", "1", "--api-key", KEY, "--grpc-port", str(grpc_port)]
    options += ["--kv-cache-memory-bytes", "64M", "--served-model-name", MODEL]
    cluster = KeyedCluster(tmp_path_factory.mktemp("clients"), options)
    cluster.grpc_port = grpc_port  # type: ignore[attr-defined]
    cluster.http.headers["authorization"] = f"Bearer {KEY}"
    try:
        cluster.wait_ready()
        yield cluster
    finally:
        cluster.end()
