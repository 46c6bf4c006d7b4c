"""Builds the one `ClusterConfig` from a YAML file, the environment, flags and Python values; the only reader of them.

Called by the command line, tests and anyone who starts a cluster from Python. Later layers win: default, file,
environment, flag. An unknown key is an error that names the nearest known one. Knows nothing of Ray or processes.

Defaults (the classes in `settings.py` and `penstock.workers.settings` hold them):

    block 16 tokens | lease 10 s | heartbeat 0.5 s | step budget 512 tokens on CPU, 2,048 on GPU
    threads = a worker's share of the cores | messages up to 64 MB | pools 1 prefill + 1 decode | 127.0.0.1:8000
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from penstock.cluster.coercion import coerce
from penstock.cluster.cores import share_of, shares_of
from penstock.cluster.derived import derive, gpus_here
from penstock.cluster.settings import ClusterConfig, group_settings, with_value
from penstock.cluster.validation import check_values, check_whole
from penstock.cluster.widths import check_host
from penstock.workers.errors import ConfigError
from penstock.workers.protocol import Role
from penstock.workers.settings import WorkerSettings
from penstock.workers.tls import check_files

ENVIRONMENT_KEYS = {"PENSTOCK_API_KEY": "front.api_key", "PENSTOCK_RAY_ADDRESS": "ray.address"}
URL_VARIABLE = "PENSTOCK_URL"
CA_FILE_VARIABLE = "PENSTOCK_CA_FILE"
DEFAULT_URL = "http://127.0.0.1:8000"
ADMIN_URL_VARIABLE = "PENSTOCK_ADMIN_URL"
DEFAULT_ADMIN_URL = "http://127.0.0.1:8001"
RAY_VARIABLES = ("RAY_ADDRESS", "RAY_JOB_ID", "RAY_JOB_CONFIG_JSON_ENV_VAR")  # in Ray jobs and beside a Ray cluster
MAX_FILE_BYTES = 1 << 20
# Variables that change how Penstock and what it stands on behave, by their beginnings; shown by `penstock collect-env`.
TELLING = (
    "PENSTOCK_ RAY_ CUDA_ NVIDIA_ NCCL_ GLOO_ TORCH TRITON_ HF_ TRANSFORMERS_ TOKENIZERS_ OMP_ MKL_ GOMP_ KMP_ GRPC_ "
    "OTEL_ UCX_ KUBERNETES_SERVICE_HOST LD_PRELOAD LD_LIBRARY_PATH PYTHON HTTP_PROXY HTTPS_PROXY NO_PROXY"
).split()
SECRET_WORDS = ("KEY", "TOKEN", "SECRET", "PASSWORD", "CREDENTIAL", "AUTH", "PROXY")


@dataclass(frozen=True, slots=True)
class Sourced:
    """A raw value and the words that say where it came from."""

    value: object
    source: str


@dataclass(frozen=True, slots=True)
class ClusterIdentity:
    """What all workers of one cluster share and strangers do not know. `key` is hex."""

    cluster_id: str
    key: str = dataclasses.field(repr=False)


def load_config(
    file: Path | None = None,
    flags: Mapping[str, Sourced] | None = None,
    values: Mapping[str, object] | None = None,
    environment: Mapping[str, str] | None = None,
) -> ClusterConfig:
    """Merge all layers, read what the model directory says, and check the whole.

    `flags` and `values` map dotted keys to values (`values` are a Python caller's); `environment` replaces the
    process's own in tests. Raises ConfigError (which names the key) or ModelError (which names the file).
    """
    layers: dict[str, Sourced] = {}
    if file is not None:
        layers.update(read_file(file))
    layers.update(_read_environment(os.environ if environment is None else environment))
    layers.update(flags or {})
    layers.update({key: Sourced(value, "Python") for key, value in (values or {}).items()})
    config = check_whole(derive(check_values(build(layers), list(known_keys()))))
    if not config.ray.address:
        check_files(config.tls)
        check_host(config, len(config.runner.cpus) or len(os.sched_getaffinity(0)), gpus_here())
    return config


def build(layers: Mapping[str, Sourced]) -> ClusterConfig:
    """The tree with `layers` over the defaults, nothing derived or checked across keys."""
    known = known_keys()
    tree = ClusterConfig(sources={key: sourced.source for key, sourced in layers.items()})
    for key, sourced in layers.items():
        if key not in known:
            raise unknown_key(key, known, sourced.source)
        tree = with_value(tree, key, coerce(sourced.value, known[key], key, sourced.source))
    return tree


@functools.cache  # type hints take a while to resolve, and never change
def known_keys(tree: type = ClusterConfig, prefix: str = "") -> dict[str, Any]:
    """Every dotted key and its type, in the tree's order."""
    keys: dict[str, Any] = {}
    for name, kind in get_type_hints(tree).items():
        if dataclasses.is_dataclass(kind) and isinstance(kind, type):
            keys.update(known_keys(kind, f"{prefix}{name}."))
        elif prefix:  # the root's own plain field is `sources`, which nobody sets
            keys[f"{prefix}{name}"] = kind
    return keys


def unknown_key(key: str, known: Iterable[str], source: str) -> ConfigError:
    """The error for a key that does not exist, with the nearest that does."""
    candidates = list(known)
    near = [k for k in candidates if k.split(".")[-1] == key.split(".")[-1]][:1]
    near = near or difflib.get_close_matches(key, candidates, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return ConfigError(f"{source}: unknown key {key!r}{hint}", key=key)


def read_file(path: Path) -> dict[str, Sourced]:
    """The flat keys of one YAML file (sections as mappings)."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ConfigError(f"{path}: larger than {MAX_FILE_BYTES} bytes", key="--config")
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error).replace("\n", " ")
        raise ConfigError(f"{path}: cannot be read as YAML: {reason}", key="--config") from error
    return {key: Sourced(value, str(path)) for key, value in _flatten(raw or {}, "", str(path)).items()}


def worker_settings(
    config: ClusterConfig,
    role: Role,
    index: int,
    identity: ClusterIdentity,
    incarnation: int = 1,
    parent_pid: int = 0,
) -> WorkerSettings:
    """What one worker is told, or rank 0 of it; its id is `<role>-<index>`, its cores are those of all its ranks."""
    cpus = share_of(shares_of(config), config.runner.cpus, role, index)
    return WorkerSettings(
        worker_id=f"{role.value}-{index}",
        role=role,
        incarnation=incarnation,
        cluster_id=identity.cluster_id,
        cluster_key=identity.key,
        heartbeat_s=config.health.heartbeat_s,
        router_lease_s=config.health.router_lease_s,
        drain_s=config.health.drain_s,
        parent_pid=parent_pid,
        scheduler=config.scheduler,
        kv=config.kv,
        transfer=config.transfer,
        runner=dataclasses.replace(config.runner, cpus=cpus),
        group=group_settings(config, role),
        tracing=config.tracing,
        logs=config.logs,
        weights=config.weights,
        ledger=config.ledger,
        tls=config.tls,
        adapters=dataclasses.replace(config.adapters, modules={}),  # which there are is the ingress' knowledge
    )


def server_address(url: str | None = None, api_key: str | None = None) -> tuple[str, str]:
    """URL and key that a client, `status` or `bench` should use: the arguments, else the environment's, else local."""
    stated, key = stated_server(url, api_key)
    return stated or DEFAULT_URL, key


def admin_address(url: str | None = None, api_key: str | None = None) -> tuple[str, str]:
    """The same of the listener that answers operators."""
    return (url or os.environ.get(ADMIN_URL_VARIABLE) or DEFAULT_ADMIN_URL).rstrip("/"), stated_server(url, api_key)[1]


def stated_server(url: str | None = None, api_key: str | None = None) -> tuple[str | None, str]:
    """`server_address` without its last resort: None when neither the argument nor the environment names a URL."""
    stated = (url or os.environ.get(URL_VARIABLE) or "").rstrip("/")
    return stated or None, api_key if api_key is not None else os.environ.get("PENSTOCK_API_KEY", "")


def stated_ca_file(ca_file: str | None = None) -> str:
    """The authorities that a client was told to trust; empty: the system's."""
    return ca_file or os.environ.get(CA_FILE_VARIABLE, "")


def ray_is_announced() -> bool:
    """True in a process that Ray started, that is connected to Ray, or that the environment points to one."""
    ray = sys.modules.get("ray")
    initialized = getattr(ray, "is_initialized", None)
    return bool(initialized and initialized()) or any(os.environ.get(name) for name in RAY_VARIABLES)


def shown_environment(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """The variables that matter to a report of a problem; those that may hold a secret say only that they are set."""
    variables = os.environ if environment is None else environment
    telling = sorted(name for name in variables if name.upper().startswith(tuple(TELLING)))
    secret = {name for name in telling if any(word in name.upper() for word in SECRET_WORDS)}
    return {name: "(set, not shown)" if name in secret else variables[name] for name in telling}


def export_environment(variables: Mapping[str, str]) -> None:
    """Set variables of this process that a library it starts reads (Ray and its Serve have no other switch)."""
    os.environ.update(variables)


def _read_environment(environment: Mapping[str, str]) -> dict[str, Sourced]:
    return {
        key: Sourced(environment[name], f"environment {name}")
        for name, key in ENVIRONMENT_KEYS.items()
        if environment.get(name)
    }


def _flatten(raw: object, prefix: str, source: str) -> dict[str, object]:
    """Nested sections as dotted keys; unknown sections and keys are errors here, where the nearest can be named."""
    known = known_keys()
    sections = {key[: key.rindex(".")] for key in known} | {key.split(".")[0] for key in known}
    if not isinstance(raw, dict):
        raise ConfigError(
            f"{source}: {prefix.rstrip('.') or 'the file'}: expected keys and values, not {raw!r}", "--config"
        )
    flat: dict[str, object] = {}
    for name, value in raw.items():
        key = f"{prefix}{name}"
        if key in sections:
            flat.update(_flatten(value or {}, f"{key}.", source))
        elif key in known:
            flat[key] = value
        else:
            raise unknown_key(key, [*known, *sections], source)
    return flat
