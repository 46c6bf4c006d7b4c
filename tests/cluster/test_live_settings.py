"""Pool sizes in Serve's user_config."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from penstock.cluster.live_settings import live_pools, user_config_of
from penstock.cluster.settings import ClusterConfig, PoolSettings
from penstock.workers.errors import ConfigError

CONFIG = ClusterConfig(pools=PoolSettings(prefill=2, decode=3))


@pytest.mark.parametrize(
    "user_config",
    [{"pools": {"decode": 5}}, {"pools.decode": "5"}, {"decode": 5}, {"pools": {"decode": 5, "mixed": 0}}],
)
def test_spellings(user_config: dict[str, Any]) -> None:
    assert live_pools(CONFIG, user_config) == dataclasses.replace(CONFIG.pools, decode=5)


def test_what_is_written_is_what_holds() -> None:
    assert live_pools(CONFIG, user_config_of(CONFIG)) == CONFIG.pools


@pytest.mark.parametrize(
    ("user_config", "words"),
    [
        ({"pools": {"decodes": 1}}, "pools.decodes.*did you mean 'pools.decode'"),
        ({"kv.block_size": 32}, "unknown key 'kv.block_size'"),
        ({"pools": {"decode": "many"}}, "'many'"),
        ({"pools": {"decode": 0}}, "pools.decode"),
        ({"pools": {"decode": -1}}, "pools.decode"),
        ("decode=3", "expected keys and values"),
    ],
)
def test_mistakes_are_named(user_config: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        live_pools(CONFIG, user_config)
