"""What is fixed before a cluster starts."""

import os
import socket
from pathlib import Path

import pytest
from fakes.ports import free_port

from penstock.cluster.listen_address import settle
from penstock.cluster.settings import ClusterConfig, with_value
from penstock.workers.errors import ConfigError


def config_with(**values: object) -> ClusterConfig:
    config = ClusterConfig()
    for key, value in values.items():
        config = with_value(config, key.replace("__", "."), value)
    return config


def test_a_port_that_is_taken_is_refused() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{port}") as refused:
            settle(config_with(front__port=port))
        assert refused.value.key == "front.port"
        assert settle(config_with(front__port=port, ray__address="elsewhere:1")).front.port == port


def test_port_zero_becomes_a_free_one() -> None:
    settled = settle(config_with(front__port=0))
    assert settled.front.port > 0
    assert settled.sources["front.port"] == "a free port"


def test_operators_have_a_port_of_their_own() -> None:
    """The next one, a free one beside a free one, or the one that was stated; taken ones are refused by their key."""
    port = free_port()
    assert settle(config_with(front__port=port)).front.operators_port == port + 1
    chosen = settle(config_with(front__port=0)).front
    assert chosen.operators_port not in (0, chosen.port)
    assert settle(config_with(front__port=port, front__admin="shared")).front.operators_port == port
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        stated = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{stated}") as refused:
            settle(config_with(front__port=port, front__admin_port=stated))
        assert refused.value.key == "front.admin_port"


def test_a_free_port_is_kept_and_the_model_path_becomes_absolute(tmp_path: Path) -> None:
    port = free_port()
    relative = os.path.relpath(tmp_path)
    settled = settle(config_with(front__port=port, runner__model_dir=relative))
    assert settled.front.port == port
    assert settled.runner.model_dir == str(tmp_path.resolve())
