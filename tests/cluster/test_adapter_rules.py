"""Adapters in the configuration: every way to state them, and every combination that cannot be served."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from penstock.cluster.adapter_rules import adapter_places
from penstock.cluster.app_arguments import config_of
from penstock.cluster.client_answers import _error
from penstock.cluster.client_batch import RETRIED
from penstock.cluster.commands.flags import flag_values
from penstock.cluster.config import ClusterIdentity, Sourced, load_config, worker_settings
from penstock.cluster.editions import edition_of
from penstock.cluster.ingress.settings import ingress_settings
from penstock.cluster.llm_config import translate
from penstock.cluster.model_directory import describe
from penstock.cluster.settings import ClusterConfig
from penstock.workers.errors import ConfigError, RefusedError
from penstock.workers.protocol import FailureCode, Role
from penstock.workers.settings import AdapterSettings, RunnerSettings, WorkerSettings

LOADING = {"model_id": "tiny", "model_source": "/models/tiny"}


def load(**values: Any) -> ClusterConfig:
    keys = {name.replace("__", "."): value for name, value in values.items()}
    return load_config(environment={}, values=keys)


def test_flags_and_a_relative_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loras").mkdir()
    given = {"lora_dir": "loras", "lora_modules": ["a=one", "b=two/x"], "max_loras": "8", "max_lora_rank": "32"}
    config = load_config(environment={}, flags=flag_values(given))
    assert config.adapters == AdapterSettings(str(tmp_path / "loras"), {"a": "one", "b": "two/x"}, 8, 32)


def test_workers_are_told_but_for_the_names(tmp_path: Path) -> None:
    """More names are no other workers."""
    config = load(adapters__directory=str(tmp_path), adapters__modules={"a": "one"})
    told = worker_settings(config, Role.MIXED, 0, ClusterIdentity("c", "00" * 32))
    assert told.adapters == AdapterSettings(str(tmp_path))
    assert WorkerSettings.from_json(told.to_json()).adapters == told.adapters
    keys = [edition_of(load(adapters__directory=str(tmp_path), adapters__modules=m)).key for m in ({}, {"a": "one"})]
    assert keys[0] == keys[1]
    assert edition_of(load()).key != keys[0]


def test_an_ingress_has_them(tmp_path: Path) -> None:
    config = load(adapters__directory=str(tmp_path), adapters__modules={"a": "one"})
    settings = ingress_settings(config, describe(config.runner))
    assert settings.adapters.enabled
    settings.adapters.look()
    assert [(listed.name, listed.ref) for listed in settings.adapters.listed()] == [("a", None)]
    plain = load()
    assert not ingress_settings(plain, describe(plain.runner)).adapters.enabled


@pytest.mark.parametrize("text", [["a"], ["a=one", "a=two"], "a", [1], 7])
def test_what_is_no_mapping(tmp_path: Path, text: object) -> None:
    with pytest.raises(ConfigError, match=r"adapters\.modules"):
        load(adapters__directory=str(tmp_path), adapters__modules=text)


@pytest.mark.parametrize(
    ("values", "key", "says"),
    [
        ({"adapters__directory": ""}, "adapters.directory", "need the directory"),
        ({"adapters__directory": "/no/such/place"}, "adapters.directory", "no such directory"),
        ({"adapters__modules": {"a:b": "one"}}, "adapters.modules", "a name is"),
        ({"adapters__modules": {"": "one"}}, "adapters.modules", "a name is"),
        ({"adapters__modules": {"base": "one"}, "front__served_model_name": "base"}, "adapters.modules", "itself"),
        ({"adapters__modules": {"a": "../one"}}, "adapters.modules", "below the directory"),
        ({"adapters__modules": {"a": "/one"}}, "adapters.modules", "below the directory"),
        ({"adapters__max_loaded": 0}, "adapters.max_loaded", "more than zero"),
        ({"adapters__max_loaded": 100_000}, "adapters.max_loaded", "is not 1 to"),
        ({"adapters__max_rank": 100_000}, "adapters.max_rank", "is not 1 to"),
        ({"adapters__host_bytes": -1}, "adapters.host_bytes", "zero or more"),
        ({"pools__context_parallel_size": 2}, "adapters.directory", "context ranks"),
        ({"runner__kind": "oracle"}, "adapters.directory", "oracle"),
        ({"runner__model_impl": "transformers"}, "adapters.directory", "our own decoders"),
    ],
)
def test_what_cannot_be_served(tmp_path: Path, values: dict[str, Any], key: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as error:
        load(**{"adapters__directory": str(tmp_path), "adapters__modules": {"a": "one"}, **values})
    assert error.value.key == key


def test_no_room_for_loaded_ones_is_fine(tmp_path: Path) -> None:
    assert load(adapters__directory=str(tmp_path), adapters__host_bytes=0).adapters.host_bytes == 0


def test_places_of_the_oracle() -> None:
    with pytest.raises(ConfigError, match="no adapters"):
        adapter_places(describe(RunnerSettings(kind="oracle")))


def test_rays_lora_config(model_dir: Path, tmp_path: Path) -> None:
    lora = {"dynamic_lora_loading_path": str(tmp_path), "max_num_adapters_per_replica": 16}
    found = translate({"model_loading_config": LOADING, "lora_config": lora, "engine_kwargs": {"enable_lora": True}})
    assert found["adapters.directory"] == str(tmp_path)
    assert found["adapters.max_loaded"] == 16
    engine = {"max_loras": 3, "max_lora_rank": 32}
    loading = {"model_id": "m", "model_source": str(model_dir)}
    config = config_of({"model_loading_config": loading, "lora_config": lora, "engine_kwargs": engine})
    assert config.adapters == AdapterSettings(os.path.abspath(tmp_path), {}, 3, 32)


@pytest.mark.parametrize("path", ["s3://bucket/x", "gs://x", "https://host/x", "file:///x", 3])
def test_adapters_elsewhere_are_refused(path: object) -> None:
    with pytest.raises(ConfigError, match="dynamic_lora_loading_path"):
        translate({"model_loading_config": LOADING, "lora_config": {"dynamic_lora_loading_path": path}})


def test_the_rest_of_rays_fields_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"lora_config\.download_timeout_s"):
        translate({"model_loading_config": LOADING, "lora_config": {"download_timeout_s": 3}})
    with pytest.raises(ConfigError, match="enable_lora"):
        translate({"model_loading_config": LOADING, "engine_kwargs": {"enable_lora": True}})


def test_a_handle_knows_the_failure_and_tries_again() -> None:
    error = _error(503, {"message": "x", "type": "service_unavailable", "code": "adapter_unavailable"}, 1.0)
    assert isinstance(error, RefusedError)
    assert error.code is FailureCode.ADAPTER
    assert error.code in RETRIED


def test_yaml(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(f"adapters: {{directory: {tmp_path}, modules: {{a: one}}}}\n")
    assert load_config(path, environment={}).adapters.modules == {"a": "one"}
    flags = {"adapters.modules": Sourced(["b=two"], "--lora-modules")}
    assert load_config(path, environment={}, flags=flags).adapters.modules == {"b": "two"}
