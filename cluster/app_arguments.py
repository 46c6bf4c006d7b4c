"""From the arguments of a Serve application to a configuration, with the same errors as everywhere else.

`serve_app.build` calls it. Arguments are configuration keys, nested or dotted, or flags of `penstock serve` (dashes,
underscores or neither); `serve run` hands all values over as text. The shape of Ray's own `LLMConfig` is translated by
`llm_config.py` first. Knows nothing of Serve.
"""

from __future__ import annotations

import collections.abc
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, get_origin

import yaml

from penstock.cluster.commands.flags import SERVE_FLAGS
from penstock.cluster.config import Sourced, known_keys, load_config, unknown_key
from penstock.cluster.llm_config import is_llm_config, translate
from penstock.cluster.model_directory import describe
from penstock.cluster.settings import ClusterConfig, with_value
from penstock.cluster.text import load_text
from penstock.workers.errors import ConfigError

SOURCE = "application arguments"
CONFIG_FILE = "config"
MODEL_NAMES = ("model", "model_dir")


def config_of(args: Mapping[str, Any]) -> ClusterConfig:
    """The configuration that an application's arguments mean. Raises ConfigError or ModelError."""
    if not isinstance(args, Mapping):
        raise ConfigError(f"{SOURCE}: expected keys and values, not {args!r}", SOURCE)
    stated = dict(translate(args) if is_llm_config(args) else args)
    file = stated.pop(CONFIG_FILE, None)
    layers = {key: Sourced(value, SOURCE) for key, value in flatten(stated).items()}
    if "ray.address" in layers:
        raise ConfigError(f"{SOURCE}: ray.address: an application runs where it is deployed", "ray.address")
    layers["ray.address"] = Sourced("auto", "the cluster it is deployed to")
    config = load_config(file=Path(str(file)) if file is not None else None, flags=layers)
    # Read once here what every ingress will read, so that a bad tokenizer is told before anything starts.
    load_text(
        describe(config.runner, config.weights),
        config.front.skip_tokenizer_init,
        config.scheduler.max_model_len,
        config.front.tool_call_parser,
    )
    if config.runner.model_dir:
        config = with_value(config, "runner.model_dir", str(Path(config.runner.model_dir).resolve()))
    if "front.port" in config.sources:
        return config
    sources = {**config.sources, "front.port": "Serve's proxies listen"}
    settled: ClusterConfig = replace(with_value(config, "front.port", 0), sources=sources)
    return settled


def flatten(args: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted configuration keys and their values. Raises ConfigError for what is neither key, section nor flag."""
    known = known_keys()
    sections = {key[: key.rindex(".")] for key in known} | {key.split(".")[0] for key in known}
    flags = {flag.parameter: flag.key for flag in SERVE_FLAGS} | dict.fromkeys(MODEL_NAMES, "runner.model_dir")
    flat: dict[str, Any] = {}

    def enter(key: str, value: Any) -> None:
        if key in known:
            flat[key] = _structured(value, key) if _is_mapping(known[key]) else value
        elif key in sections:
            for name, inner in _structured(value, key).items():
                enter(f"{key}.{name}", inner)
        else:
            raise unknown_key(key, [*known, *sections, *flags, CONFIG_FILE], SOURCE)

    for name, value in args.items():
        plain = str(name).lstrip("-").replace("-", "_")
        enter(flags.get(plain, str(name)), value)
    return flat


def _is_mapping(kind: Any) -> bool:
    return get_origin(kind) in (dict, Mapping, collections.abc.Mapping)


def _structured(value: Any, key: str) -> dict[str, Any]:
    """A mapping, which `serve run` hands over as text."""
    if isinstance(value, str):
        try:
            value = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"{SOURCE}: {key}: {value!r} cannot be read as YAML", key) from error
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(f"{SOURCE}: {key}: expected keys and values, not {value!r}", key)
    return value
