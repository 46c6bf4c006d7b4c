"""Which URL `connect()` takes; the lookup on a real Ray cluster is in `grpc_front/test_cluster.py`."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from penstock.cluster import client_lookup
from penstock.cluster.client import connect
from penstock.cluster.client_lookup import find_url, reachable
from penstock.cluster.config import DEFAULT_URL, RAY_VARIABLES
from penstock.cluster.discovery import ClusterAddress
from penstock.workers.errors import ConfigError, RefusedError


@pytest.fixture
def outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """No Ray anywhere near, nothing in the environment."""
    for name in (*RAY_VARIABLES, "PENSTOCK_URL", "PENSTOCK_API_KEY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def on_ray(outside: None, monkeypatch: pytest.MonkeyPatch) -> dict[str, ClusterAddress]:
    """A Ray whose clusters are in the returned mapping."""
    clusters: dict[str, ClusterAddress] = {}

    @contextmanager
    def connected(required: bool) -> Iterator[bool]:
        yield True

    def address(cluster: str) -> ClusterAddress:
        if cluster not in clusters and (cluster or len(clusters) > 1):
            raise ConfigError("which cluster?")
        return clusters[cluster or next(iter(clusters))]

    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    monkeypatch.setattr(client_lookup, "_connected", connected)
    monkeypatch.setattr(client_lookup, "running_clusters", lambda: sorted(clusters))
    monkeypatch.setattr(client_lookup, "cluster_address", address)
    return clusters


def address(name: str, *urls: str, needs_key: bool = False) -> ClusterAddress:
    return ClusterAddress(name, name, urls, ("m",), needs_key)


def test_what_is_stated_wins(on_ray: dict[str, ClusterAddress], monkeypatch: pytest.MonkeyPatch) -> None:
    on_ray["a"] = address("a", "http://127.0.0.1:1")
    assert connect("http://elsewhere:8000/").url == "http://elsewhere:8000"
    assert connect().url == "http://127.0.0.1:1"
    monkeypatch.setenv("PENSTOCK_URL", "http://stated:1/")
    assert connect().url == "http://stated:1"


def test_outside_of_ray_it_is_the_local_server(outside: None) -> None:
    assert connect().url == DEFAULT_URL


def test_several_clusters_need_a_name(on_ray: dict[str, ClusterAddress]) -> None:
    on_ray.update(a=address("a", "http://127.0.0.1:1"), b=address("b", "http://127.0.0.1:2"))
    assert connect(cluster="b").url == "http://127.0.0.1:2"
    with pytest.raises(ConfigError, match="which cluster"):
        connect()


def test_a_ray_without_clusters_changes_nothing(on_ray: dict[str, ClusterAddress]) -> None:
    assert connect().url == DEFAULT_URL
    with pytest.raises(ConfigError):
        connect(cluster="a")


def test_a_cluster_that_asks_for_a_key_gets_one_or_says_so(on_ray: dict[str, ClusterAddress]) -> None:
    on_ray["a"] = address("a", "http://127.0.0.1:1", needs_key=True)
    assert connect(api_key="k").url == "http://127.0.0.1:1"
    with pytest.raises(ConfigError, match="PENSTOCK_API_KEY"):
        connect()


def test_a_cluster_without_a_server(on_ray: dict[str, ClusterAddress]) -> None:
    on_ray["a"] = address("a")
    with pytest.raises(RefusedError, match="no HTTP server"):
        find_url("a", "")


def test_the_first_that_can_be_reached() -> None:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        there = f"http://127.0.0.1:{listening.getsockname()[1]}"
        assert reachable(["http://127.0.0.1:1", there]) == there
        assert reachable(["http://127.0.0.1:1/a", "http://127.0.0.1:1/b"]) == "http://127.0.0.1:1/a"
