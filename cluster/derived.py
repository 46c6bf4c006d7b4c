"""Values nobody stated and that follow from others: context length from the model, threads from the cores, and so on.

Pure but for reading the model directory and the number of cores. A stated value is never replaced, but that a relative
`adapters.directory` becomes absolute; each derived one says in `sources` what it follows from.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from penstock.cluster.adapter_rules import check_adapters
from penstock.cluster.model_directory import EMBEDDED_MODEL, ModelDescription, describe
from penstock.cluster.settings import ClusterConfig, with_value
from penstock.cluster.widths import check_widths
from penstock.workers.errors import ConfigError
from penstock.workers.protocol import Role

CPU_STEP_TOKENS = 512
GPU_STEP_TOKENS = 2048
_GPUS = Path("/proc/driver/nvidia/gpus")  # one folder per card that the driver serves
_RECORDS = "~/.cache/penstock/records"


def derive(config: ClusterConfig, cores: int | None = None, gpus: int | None = None) -> ClusterConfig:
    """`config` with every unstated dependent value filled in.

    Raises ModelError for an unreadable model directory, ConfigError for what its model cannot be.
    """
    model = describe(config.runner, config.weights)
    given = tuple(range(cores)) if cores else tuple(sorted(os.sched_getaffinity(0)))
    cores = len(config.runner.cpus or given)
    config = _pools(config)
    if config.runner.kind == "model":
        config = _fill(config, "runner.model_impl", model.model_impl, model.model_impl_reason)
    config = _fill(config, "front.served_model_name", (model.name,), "the model directory's name")
    if config.ray.address:  # workers run elsewhere, on what they asked Ray for
        config = _fill(config, "runner.threads", max(1, int(config.ray.worker_num_cpus)), "ray.worker_num_cpus")
    config = _fill(config, "runner.threads", max(1, cores // max(1, config.pools.ranks)), f"its share of {cores} cores")
    config = _cores(config, given)
    if config.runner.kind == "model" and not config.runner.model_dir:
        config = _fill(config, "runner.model_dir", str(EMBEDDED_MODEL), "the embedded model")
        config = _fill(config, "runner.dtype", "float32", "the embedded model")  # stored in half of that for its size
    if config.runner.kind == "oracle":
        config = _fill(config, "front.skip_tokenizer_init", True, "the oracle has no tokenizer")
        config = _oracle_heads(config)
    config = _device(config, gpus_here() if gpus is None else gpus)
    if config.scheduler.max_num_batched_tokens < config.scheduler.max_num_seqs:
        most = config.scheduler.max_num_batched_tokens
        config = _fill(config, "scheduler.max_num_seqs", most, "scheduler.max_num_batched_tokens")
    check_widths(config, model)
    if config.adapters.directory:
        config = with_value(config, "adapters.directory", os.path.abspath(config.adapters.directory))
    check_adapters(config, model)
    return _context(config, model)


def _oracle_heads(config: ClusterConfig) -> ClusterConfig:
    """Pools of different widths exchange KV only if both know the same heads."""
    widths = [config.pools.width(role) for role in Role]
    if len(set(widths)) == 1:
        return config
    return _fill(config, "runner.oracle_kv_heads", max(widths), "the widest worker")


def _cores(config: ClusterConfig, given: tuple[int, ...]) -> ClusterConfig:
    """Ranks that compute on the cores of our own host keep to a part each, where their threads fit side by side."""
    runner, ranks = config.runner, config.pools.ranks
    if runner.kind != "model" or runner.device != "cpu" or config.ray.address or ranks < 2:
        return config
    if ranks * runner.threads > len(given):
        return config
    what = "workers" if ranks == config.pools.total else "ranks"
    return _fill(config, "runner.cpus", given, f"{ranks} {what} side by side on {len(given)} cores")


def _device(config: ClusterConfig, gpus: int) -> ClusterConfig:
    """What follows from the device: the step's budget, what actors ask Ray for, and each worker's share of a card.

    `cuda:N` names a card of this host, which all workers share; `cuda` is what Ray gives an actor: a whole card on a
    cluster of others, and on our own head a share where there are more workers than cards. Ranks of a group never
    share one: their collectives do not work so.
    """
    device, workers = config.runner.device, max(1, config.pools.total)
    on_gpu = device.startswith("cuda") or (device == "auto" and (gpus > 0 or config.ray.worker_num_gpus > 0))
    budget = GPU_STEP_TOKENS if on_gpu else CPU_STEP_TOKENS
    config = _fill(config, "scheduler.max_num_batched_tokens", budget, f"device {device}")
    if not on_gpu:
        return config
    config = _fill(config, "runner.record_dir", str(Path(_RECORDS).expanduser()), f"device {device}")
    share = 1.0 / workers
    if ":" not in device:
        whole = config.ray.address or not gpus or config.pools.widest > 1
        card = 1.0 if whole else 1.0 / -(-workers // gpus)
        config = _fill(config, "ray.worker_num_gpus", card, f"device {device}")
        share = min(1.0, config.ray.worker_num_gpus or 1.0)
    if share < 1.0:
        usual = config.kv.gpu_memory_utilization
        config = _fill(config, "kv.gpu_memory_utilization", usual * share, f"{share:g} of a GPU per worker")
    return config


def gpus_here() -> int:
    """Cards that this host's driver serves; asking it loads no library."""
    return sum(1 for _ in _GPUS.iterdir()) if _GPUS.is_dir() else 0


def _pools(config: ClusterConfig) -> ClusterConfig:
    """A caller who asks for mixed workers only does not get the default split pair beside them."""
    stated = config.sources
    if config.pools.mixed and not {"pools.prefill", "pools.decode"} & set(stated):
        for key in ("pools.prefill", "pools.decode"):
            config = _fill(config, key, 0, "only mixed workers asked for")
    return config


def _context(config: ClusterConfig, model: ModelDescription) -> ClusterConfig:
    limit = config.scheduler.max_model_len
    if "scheduler.max_model_len" in config.sources or model.directory is None:
        if limit > model.context_length:
            raise ConfigError(
                f"max_model_len {limit} is longer than the model's context of {model.context_length} tokens "
                f"({model.length_key} in {model.directory}/config.json)",
                key="scheduler.max_model_len",
            )
        return config
    return _fill(config, "scheduler.max_model_len", model.context_length, f"{model.length_key} of the model")


def _fill(config: ClusterConfig, key: str, value: object, source: str) -> ClusterConfig:
    if key in config.sources:
        return config
    sources: Mapping[str, str] = {**config.sources, key: source}
    changed: ClusterConfig = with_value(replace(config, sources=sources), key, value)
    return changed
