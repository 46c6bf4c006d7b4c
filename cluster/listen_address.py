"""Fixes what other processes of a cluster must be told before they start: a port that is free, an absolute model path.

`launch.py` calls it first, so that a taken port is one clear error and not a server that fails far away.
"""

from __future__ import annotations

import socket
from dataclasses import replace
from pathlib import Path

from penstock.cluster.settings import ClusterConfig, with_value
from penstock.workers.errors import ConfigError


def settle(config: ClusterConfig) -> ClusterConfig:
    """`config` with its model path absolute and its ports known to be free. Raises ConfigError when one is taken."""
    if config.runner.model_dir:
        config = with_value(config, "runner.model_dir", str(Path(config.runner.model_dir).resolve()))
    host, port = config.front.host, config.front.port
    if config.front.grpc_port and not config.ray.address:
        _check_free(host, config.front.grpc_port, "front.grpc_port")
    if port == 0:
        config = _with_free_port(config, "front.port", host)
    elif not config.ray.address:  # a cluster elsewhere has ports of its own
        _check_free(host, port, "front.port")
    return config if config.front.admin == "shared" else _settle_admin(config, chosen=port == 0)


def _settle_admin(config: ClusterConfig, *, chosen: bool) -> ClusterConfig:
    """`chosen`: the API's port was; who leaves that to us leaves this, too."""
    host, port = config.front.admin_host, config.front.operators_port
    if chosen and config.front.admin_port == 0:
        return _with_free_port(config, "front.admin_port", host)
    if not config.ray.address:
        _check_free(host, port, "front.admin_port")
    return config


def _with_free_port(config: ClusterConfig, key: str, host: str) -> ClusterConfig:
    sources = {**config.sources, key: "a free port"}
    settled: ClusterConfig = replace(with_value(config, key, free_port(host)), sources=sources)
    return settled


def _check_free(host: str, port: int, key: str) -> None:
    try:
        _bind(host, port).close()
    except OSError as error:
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}", key=key) from error


def _bind(host: str, port: int) -> socket.socket:
    probe = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        # As the server does it: without, a port in TIME_WAIT from our own last run would look taken.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, port))
    except OSError:
        probe.close()
        raise
    return probe


def free_port(host: str) -> int:
    """A port that nobody listens on at the moment."""
    with _bind(host, 0) as probe:
        return int(probe.getsockname()[1])
