"""Values nobody stated and that follow from others: context length from the model, threads from the cores, and so on.

Pure but for reading the model directory and the number of cores. A stated value is never replaced; each derived one
says in `sources` what it follows from.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace

from penstock.cluster.model_directory import EMBEDDED_MODEL, ModelDescription, describe
from penstock.cluster.settings import ClusterConfig, with_value
from penstock.workers.errors import ConfigError

CPU_STEP_TOKENS = 512
GPU_STEP_TOKENS = 2048


def derive(config: ClusterConfig, cores: int | None = None) -> ClusterConfig:
    """`config` with every unstated dependent value filled in. Raises ModelError for an unreadable model directory."""
    model = describe(config.runner)
    cores = cores or len(os.sched_getaffinity(0))
    config = _pools(config)
    if config.runner.kind == "model":
        config = _fill(config, "runner.model_impl", model.model_impl, model.model_impl_reason)
    config = _fill(config, "front.served_model_name", (model.name,), "the model directory's name")
    if config.ray.address:  # workers run elsewhere, on what they asked Ray for
        config = _fill(config, "runner.threads", max(1, int(config.ray.worker_num_cpus)), "ray.worker_num_cpus")
    config = _fill(config, "runner.threads", max(1, cores // max(1, config.pools.total)), f"its share of {cores} cores")
    if config.runner.kind == "model" and not config.runner.model_dir:
        config = _fill(config, "runner.model_dir", str(EMBEDDED_MODEL), "the embedded model")
        config = _fill(config, "runner.dtype", "float32", "the embedded model")  # stored in half of that for its size
    if config.runner.kind == "oracle":
        config = _fill(config, "front.skip_tokenizer_init", True, "the oracle has no tokenizer")
    budget = CPU_STEP_TOKENS if config.runner.device == "cpu" else GPU_STEP_TOKENS
    config = _fill(config, "scheduler.max_num_batched_tokens", budget, f"device {config.runner.device}")
    if config.scheduler.max_num_batched_tokens < config.scheduler.max_num_seqs:
        most = config.scheduler.max_num_batched_tokens
        config = _fill(config, "scheduler.max_num_seqs", most, "scheduler.max_num_batched_tokens")
    return _context(config, model)


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
