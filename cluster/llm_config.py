"""The arguments of Ray Serve's own LLM builders as ours, so that a user who moves over changes `import_path` only.

`app_arguments.py` asks. Understood are one `LLMConfig` (bare, or in `llm_configs`) and the `prefill_config` /
`decode_config` pair. What has no counterpart here is refused by its name: nothing is dropped in silence.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from penstock.cluster.commands.flags import SERVE_FLAGS
from penstock.cluster.config import unknown_key
from penstock.workers.errors import ConfigError

SOURCE = "LLMConfig"
PAIR = ("prefill_config", "decode_config")
ENGINE_OF_THE_SHAPE = "vllm"  # the only value that the shape knows; ours serves it
TRANSFER_OF_THE_ENGINE = "kv_transfer_config"  # how that engine moves KV; ours moves it anyway
_FLAGS = {flag.parameter: flag for flag in SERVE_FLAGS if flag.key.split(".")[0] in ("runner", "scheduler", "kv")}
_ENGINE = {name: flag.key for name, flag in _FLAGS.items()}
_TENSOR = "tensor_parallel_size"
_ENGINE |= {name: f"pools.{name}" for name in (_TENSOR, "expert_parallel_size", "context_parallel_size")}
_ENGINE |= {name: f"front.{name}" for name in ("tool_call_parser", "enable_auto_tool_choice")}
_ENGINE |= {"max_loras": "adapters.max_loaded", "max_lora_rank": "adapters.max_rank"}
_ADAPTERS_OF_THE_ENGINE = "enable_lora"  # ours has them where it is told where they lie
_DEPLOYMENT = {"max_ongoing_requests": "limits.max_open_requests", "graceful_shutdown_timeout_s": "health.drain_s"}
_ACTOR = {"num_cpus": "ray.worker_num_cpus", "num_gpus": "ray.worker_num_gpus"}
_TOP = ("model_loading_config", "llm_engine", "engine_kwargs", "accelerator_type", "deployment_config", "lora_config")
_LORA = {"dynamic_lora_loading_path": "adapters.directory", "max_num_adapters_per_replica": "adapters.max_loaded"}


def is_llm_config(args: Mapping[str, Any]) -> bool:
    """True for arguments in the shape of Ray's builders."""
    return any(name in args for name in ("llm_configs", "model_loading_config", *PAIR))


def translate(args: Mapping[str, Any]) -> dict[str, Any]:
    """Our dotted keys. Raises ConfigError naming what cannot be served."""
    if "llm_configs" in args:
        _only(args, ("llm_configs",), "")
        configs = args["llm_configs"]
        if not isinstance(configs, list) or len(configs) != 1:
            raise ConfigError(f"{SOURCE}: llm_configs: exactly one model per application", "llm_configs")
        return _one(_mapping(configs[0], "llm_configs[0]"), "mixed")
    if any(name in args for name in PAIR):
        _only(args, PAIR, "")
        halves = [_one(_mapping(args.get(name), name), name.split("_")[0]) for name in PAIR]
        for key in set(halves[0]) & set(halves[1]):
            if halves[0][key] != halves[1][key]:
                raise ConfigError(f"{SOURCE}: {key}: prefill and decode must agree on it", key)
        return {**halves[0], **halves[1]}
    return _one(args, "mixed")


def _one(config: Mapping[str, Any], role: str) -> dict[str, Any]:
    """One LLMConfig, whose replicas become workers of `role`."""
    _only(config, _TOP, "")
    found: dict[str, Any] = {}
    loading = _mapping(config.get("model_loading_config"), "model_loading_config")
    _only(loading, ("model_id", "model_source"), "model_loading_config.")
    source = loading.get("model_source") or loading.get("model_id")
    if not isinstance(source, str):
        raise ConfigError(f"{SOURCE}: model_loading_config.model_source: a directory is needed, not {source!r}", SOURCE)
    found["runner.model_dir"] = source
    if "model_id" in loading:
        found["front.served_model_name"] = loading["model_id"]
    if str(config.get("llm_engine") or ENGINE_OF_THE_SHAPE).lower() != ENGINE_OF_THE_SHAPE:
        raise ConfigError(f"{SOURCE}: llm_engine: {config['llm_engine']!r} is not known", "llm_engine")
    found |= _adapters(_mapping(config.get("lora_config"), "lora_config"))
    for name, value in _mapping(config.get("engine_kwargs"), "engine_kwargs").items():
        if name == TRANSFER_OF_THE_ENGINE and role != "mixed":
            continue
        if name == _ADAPTERS_OF_THE_ENGINE and (not value or "adapters.directory" in found):
            continue
        if name not in _ENGINE:
            raise unknown_key(f"engine_kwargs.{name}", [f"engine_kwargs.{known}" for known in _ENGINE], SOURCE)
        own = name == _TENSOR and role != "mixed"  # the two halves of a pair may be of different widths
        sized = _FLAGS[name].sized(value) if name in _FLAGS else value
        found[f"pools.{role}_{_TENSOR}" if own else _ENGINE[name]] = sized
    if config.get("accelerator_type"):
        found["ray.worker_accelerator_type"] = config["accelerator_type"]
    return found | _deployment(_mapping(config.get("deployment_config"), "deployment_config"), role)


def _adapters(config: Mapping[str, Any]) -> dict[str, Any]:
    """Where adapters lie. The engine's own `max_loras` wins over the bound of a replica."""
    _only(config, tuple(_LORA), "lora_config.")
    path = config.get("dynamic_lora_loading_path")
    if path is not None and (not isinstance(path, str) or "://" in path):
        key = "lora_config.dynamic_lora_loading_path"
        raise ConfigError(f"{SOURCE}: {key}: adapters are read from a directory, and {path!r} is none", key)
    return {_LORA[name]: value for name, value in config.items() if value not in (None, {}, [])}


def _deployment(config: Mapping[str, Any], role: str) -> dict[str, Any]:
    """Replicas, bounds and resources."""
    found: dict[str, Any] = {f"pools.{role}": config.get("num_replicas") or 1}
    for name, value in config.items():
        if name == "autoscaling_config":
            found[f"pools.{role}"] = _fixed_size(_mapping(value, f"deployment_config.{name}"))
        elif name == "ray_actor_options":
            actor = _mapping(value, f"deployment_config.{name}")
            _only(actor, (*_ACTOR, "resources"), "deployment_config.ray_actor_options.")
            found |= {_ACTOR[key]: amount for key, amount in actor.items() if key in _ACTOR}
            found |= {f"ray.{role}_resources": actor["resources"]} if actor.get("resources") else {}
        elif name in _DEPLOYMENT:
            found[_DEPLOYMENT[name]] = value
        elif name != "num_replicas":
            known = ["num_replicas", "autoscaling_config", "ray_actor_options", *_DEPLOYMENT]
            raise unknown_key(f"deployment_config.{name}", [f"deployment_config.{each}" for each in known], SOURCE)
    return found


def _fixed_size(config: Mapping[str, Any]) -> Any:
    """Pools have a size, not a range: a range of one is fine."""
    least, most = config.get("min_replicas", 1), config.get("max_replicas", 1)
    if least != most:
        key = "deployment_config.autoscaling_config"
        raise ConfigError(f"{SOURCE}: {key}: pools are not scaled by themselves; state num_replicas", key)
    return least


def _mapping(value: Any, key: str) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ConfigError(f"{SOURCE}: {key}: expected keys and values, not {value!r}", key)
    return value


def _only(config: Mapping[str, Any], known: tuple[str, ...], prefix: str) -> None:
    """Refuse what is not in `known`, unless it is empty."""
    for name, value in config.items():
        if name not in known and value not in (None, {}, []):
            raise unknown_key(f"{prefix}{name}", [f"{prefix}{each}" for each in known], SOURCE)
