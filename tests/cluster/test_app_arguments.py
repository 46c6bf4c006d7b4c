"""The arguments of a Serve application mean what the same keys mean elsewhere, and mistakes are named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from penstock.cluster.app_arguments import config_of
from penstock.workers.errors import ConfigError, ModelError

ORACLE = {"runner": {"kind": "oracle"}}


def test_nested_dotted_and_flags_mean_the_same(tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text("runner: {kind: oracle}\npools: {decode: 3}\nkv: {block_size: 32}\n")
    nested = config_of({**ORACLE, "pools": {"decode": 3}, "kv": {"block_size": 32}})
    for other in (
        {"runner.kind": "oracle", "pools.decode": 3, "kv.block_size": 32},
        {"runner.kind": "oracle", "decode": "3", "--block-size": "32"},
        {"runner": "{kind: oracle}", "pools": "{decode: 3}", "block-size": "32"},
        {"config": str(file)},
        {"config": file, "decode": 3},
    ):
        assert config_of(other) == nested


def test_values_as_text() -> None:
    config = config_of(
        {
            **ORACLE,
            "max_model_len": "2k",
            "enable_prefix_caching": "false",
            "ray.decode_resources": "{decode: 1}",
            "ray.worker_num_cpus": "2.5",
        }
    )
    assert config.scheduler.max_model_len == 2000
    assert config.kv.prefix_caching is False
    assert config.ray.decode_resources == {"decode": 1.0}
    assert (config.ray.worker_num_cpus, config.runner.threads) == (2.5, 2)


def test_serves_proxies_listen_unless_a_port_is_stated() -> None:
    assert config_of(ORACLE).front.port == 0
    assert config_of({**ORACLE, "port": 8123}).front.port == 8123


def test_the_model_path_becomes_absolute(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(model_dir.parent)
    for name in ("model", "runner.model_dir"):
        assert config_of({name: model_dir.name}).runner.model_dir == str(model_dir)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"decodes": 1}, "unknown key 'decodes'; did you mean 'decode'"),
        ({"pools": {"prefil": 1}}, "unknown key 'pools.prefil'; did you mean 'pools.prefill'"),
        ({"kv": "many"}, "kv: expected keys and values, not 'many'"),
        ({"kv": "{"}, "kv: '{' cannot be read as YAML"),
        ({"decode": "two"}, "pools.decode: 'two' is not of type int"),
        ({"decode": 0, "prefill": 1}, "pools.decode"),
        ({"ray.address": "auto"}, "ray.address: an application runs where it is deployed"),
        ({"ray.cluster_name": "a/b"}, "ray.cluster_name"),
        ({"ray.decode_resources": {"decode": 0}}, "ray.decode_resources"),
        ({"ray.worker_host": "somewhere"}, "ray.worker_host"),
        ({"config": "/nowhere.yaml"}, "/nowhere.yaml"),
    ],
)
def test_mistakes_are_named(args: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words.replace("{", r"\{").replace(".", r"\.")):
        config_of({**({} if "config" in args else {"runner.kind": "oracle"}), **args})


def test_a_model_that_is_not_there() -> None:
    with pytest.raises((ModelError, ConfigError), match="/nowhere"):
        config_of({"model": "/nowhere"})
